"""What a step on a GPU reads, made there from persistent tables: see `step_inputs.gpu`.

Workers on a CPU have their tables at hand and need no kernel.
"""
