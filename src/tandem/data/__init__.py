"""From a file, folder, hub name or built-in task to tokenized prompts, and the order they are taken in."""
