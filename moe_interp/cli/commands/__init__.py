"""One file a subcommand: it parses, calls and prints."""
