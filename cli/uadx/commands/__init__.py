"""One module a verb, thin: they import what they need when they run, so that ``--help`` loads nothing heavy."""
