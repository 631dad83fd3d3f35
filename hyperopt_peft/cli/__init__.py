"""The command line ``hyperopt-peft``: a subcommand a file, and what they share."""
