"""What a model is worth on rows it was not trained on."""
