#!/usr/bin/env python3
"""Megatron distributed checkpoint -> Hugging Face checkpoint: megatron_to_hf.py --megatron DIR --out DIR [--help]."""

import sys

from asyppo_megatron.convert.cli import main

if __name__ == "__main__":
    sys.exit(main(["to-hf", *sys.argv[1:]]))
