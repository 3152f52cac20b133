"""Other people's formats: export, import, sizes, names."""
