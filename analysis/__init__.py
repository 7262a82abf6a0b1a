"""Everything that looks inside a model, steers it or prunes it. Nothing is built here yet; `models.forward` already
records and edits activations (`record=`, `edit=`)."""
