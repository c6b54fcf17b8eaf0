"""What a trained trunk is worth: kNN, linear probes, weights in and out."""
