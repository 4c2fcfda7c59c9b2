"""Stop strings, found in the driver as tokens are confirmed: a burst ends a row exactly where single steps would."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.driver.detokenize import Detokenizer, StopChecker
    from shoal.driver.request import Request


class StopStrings:
    """A StopChecker for every running request that has stop strings. The tokenizer is built for the first one."""

    def __init__(self, tokenizer_json: str | None) -> None:
        self._tokenizer_json = tokenizer_json
        self._detokenizer: Detokenizer | None = None
        self._checkers: dict[int, StopChecker] = {}

    def check(self, request: Request, token: int) -> bool:
        """Whether this token, the request's newest, completes a stop string; sets stop_reason and stop_text."""
        checker = self._checkers.get(request.source.number)
        if checker is None:
            checker = self._checkers[request.source.number] = self._make(request)
        found = checker.feed([token])
        if found is None:
            return False
        _, request.stop_reason, request.stop_text = found
        return True

    def forget(self, request: Request) -> None:
        """The request is gone."""
        self._checkers.pop(request.source.number, None)

    def _make(self, request: Request) -> StopChecker:
        from shoal.driver.detokenize import Detokenizer, StopChecker

        assert self._tokenizer_json is not None, "the client refuses stop strings without a serializable tokenizer"
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self._tokenizer_json)
        params = request.source.params
        return StopChecker(
            self._detokenizer,
            request.source.prompt_token_ids,
            list(params.stop or ()),
            params.include_stop_str_in_output,
            params.min_tokens,
            params.skip_special_tokens,
            params.spaces_between_special_tokens,
        )
