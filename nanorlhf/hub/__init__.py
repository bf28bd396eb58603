"""Other people's files: model folders of Hugging Face, tokenizer files, chat templates, formats of data.

Leave it closed to understand an algorithm: the built-in tasks and tokenizers need none of it.
Open it when a folder or a data file of yours is refused, or to add a family of models.
"""

from nanorlhf.hub.folder import Missing, load, save

__all__ = ["Missing", "load", "save"]
