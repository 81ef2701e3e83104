"""Tables, figures, the one-file HTML report."""
