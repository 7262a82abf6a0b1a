"""One file per system with `get_config(variant)`. Data only; these files import nothing of this project."""
