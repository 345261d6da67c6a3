"""What the commands do, one module each: `run(arguments) -> exit status`."""
