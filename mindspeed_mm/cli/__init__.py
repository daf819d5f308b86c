"""Commands. A command is one file with HELP, EXAMPLE, add_arguments(parser) and run(namespace) -> dict."""
