"""Options of tokens that are trained beside a network: which ones, what new ones begin with, how fast they learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.errors import Problem
from library.models.token_items import LONGEST_PATTERN, is_new, split_token, token_list
from library.option_groups import OptionGroup, opt


@dataclass(frozen=True, kw_only=True)
class TokenOptions(OptionGroup, title="tokens"):
    """Tokens of the text encoder that are trained beside the network."""

    train_tokens: tuple[str, ...] = opt(
        (),
        convert=token_list,
        help="Tokens whose vectors are trained: a new word in brackets, as [fernando]; with =PATTERN after it, as "
        "'[fernando]=^dog</w>', it begins with the mean of the known tokens that the regular expression finds. "
        "Anything else is such an expression, and the tokens that it finds are trained.",
    )
    train_tokens_init: str = opt(
        "zeros",
        choices=("zeros", "random"),
        matters_when={"train_tokens": ()},
        help="What new words without a pattern begin with; random vectors have the size of usual ones.",
    )
    embedding_lr: float | None = opt(
        None,
        at_least=0,
        matters_when={"train_tokens": ()},
        metadata_key="ss_embedding_lr",
        help="Learning rate of --train_tokens. Default: --learning_rate.",
    )
    train_tokens_limit: int = opt(
        100,
        at_least=1,
        resume="free",
        matters_when={"train_tokens": ()},
        help="Refuse expressions for known tokens that find more than this.",
    )

    def check(self) -> Iterator[Problem]:
        """Refuse what no vocabulary has to be asked for."""
        seen = set()
        for item in self.train_tokens:
            token, pattern = split_token(item)
            where = f"--train_tokens {item[:60]}"
            if len(item) > LONGEST_PATTERN:
                yield Problem(where, f"has {len(item)} letters, where {LONGEST_PATTERN} are the limit")
            elif not token.strip() or (is_new(token) and (not token[1:-1].strip() or not token.isprintable())):
                yield Problem(where, "names no token", "Write a new one as [name].")
            elif token in seen:
                yield Problem(where, f"{token} is given twice", "Keep one of them.")
            elif pattern == "":
                yield Problem(where, "has no pattern after =", "Leave the = out for a word that begins at zero.")
            seen.add(token)
