"""What every node is given is checked here against the node's own schema, before the node runs."""
