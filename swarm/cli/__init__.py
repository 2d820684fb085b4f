"""The command line: the one place that wires and starts things."""
