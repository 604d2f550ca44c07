"""Training and comparing models: `compare`, `quickstart`, and what they are made of, one module each."""
