"""A trained model on its way out: to other formats, to the Hub, with a card."""
