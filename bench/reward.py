"""The reward of the GRPO benchmark: cheap, the same for everybody, and hardly ever equal within a group."""

import zlib


def score(prompt, response):
    return zlib.crc32(response.encode()) % 1000 / 1000
