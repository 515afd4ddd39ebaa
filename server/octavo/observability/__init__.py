"""Numbers and log lines about a running server; consumers only, nothing depends on them."""
