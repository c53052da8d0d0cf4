"""The command `pretrain-merge`. Each module is one subcommand; `main` turns them into a command line."""
