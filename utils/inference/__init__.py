"""From a loaded model to text: engines (the model with its cache) and the generator above them."""
