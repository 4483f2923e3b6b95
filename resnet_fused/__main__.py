"""`python -m resnet_fused` is the command `resnet-fused`."""

from resnet_fused.cli import main

if __name__ == "__main__":
    main(prog_name="resnet-fused")
