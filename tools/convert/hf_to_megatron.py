#!/usr/bin/env python3
"""Hugging Face checkpoint -> Megatron distributed checkpoint: hf_to_megatron.py --hf DIR --out DIR [--help]."""

import sys

from asyppo_megatron.convert.cli import main

if __name__ == "__main__":
    sys.exit(main(["to-megatron", *sys.argv[1:]]))
