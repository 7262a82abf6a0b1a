"""What the language models call, and what writes their first traces."""
