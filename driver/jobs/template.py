"""Prompts from Jinja templates over a row's columns."""

from __future__ import annotations

from typing import Any

from shoal.driver.jobs.faults import RowError
from shoal.driver.local_files import read_template


class PromptTemplate:
    """One template. It runs sandboxed, as chat templates do: job files may come from elsewhere."""

    def __init__(self, text_or_path: str, allowed_folder: str | None = None) -> None:
        """ValueError where it is neither a template nor a file with one that may be read."""
        import jinja2
        import jinja2.meta
        import jinja2.sandbox

        text = read_template("prompt_template", text_or_path, allowed_folder)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
        try:
            tree = environment.parse(text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"prompt_template, line {error.lineno}: {error.message}") from None
        self._template = environment.from_string(tree)
        # Names behind a default or a test may be absent; only the template can tell, so these are not asked for ahead.
        optional = any(sign in text for sign in ("default", "is defined", "is undefined"))
        self.names: frozenset[str] = frozenset(_names(tree))  # all that it may look up
        self.columns: frozenset[str] = frozenset() if optional else self.names

    def render(self, columns: dict[str, Any]) -> str:
        """The prompt of a row. RowError for whatever the template raises: it is code."""
        try:
            return str(self._template.render(columns))
        except Exception as error:
            raise RowError("template_error", "template", f"prompt_template: {type(error).__name__}: {error}") from None


def _names(tree: Any) -> set[str]:
    import jinja2.meta

    return set(jinja2.meta.find_undeclared_variables(tree))
