"""What only maintainers need, from a clone: the tables and figures of README and docs, made of the records."""
