"""Numbers about a model: loss on text, HellaSwag, generated samples. Of ours it imports only `data`."""
