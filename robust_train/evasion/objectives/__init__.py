"""Training objectives: what a model is trained on, given clean and adversarial inputs. One file each."""
