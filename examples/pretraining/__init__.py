"""How the embedded pipeline, its reward head and its judge are made: data, VAE, UNet, heads."""
