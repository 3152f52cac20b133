"""From images to .beton files, and the built-in scenes."""
