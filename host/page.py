"""What a page gets to read of a node: its report, its errors, and a line while it runs.

These texts hold names out of files and workflows, strangers' too, and there are pages that draw text as HTML or as
Markdown. So every text passes `plain` on its way out: here, and nowhere else.
"""

import functools
import re
from typing import Any

# Nobody sees it, and after it HTML and Markdown take the character before it for a letter like any other.
WORD_JOINER = "\u2060"
MARKUP = re.compile(
    r"""<(?=[a-zA-Z/!?]|\Z)           # a tag, a comment; at the end somebody may add the rest
    | &(?=\#|\w+;)                    # &lt;
    | !(?=\[) | \](?=\()              # Markdown: ![picture](address), [words](address)
    | \[(?=\[)                        # [[words|address]] of ComfyUI's progress texts
    | ^[ ]{0,3}\[(?=[^\]\n]*\]:)      # [words]: address
    """,
    re.VERBOSE | re.MULTILINE,
)
# Control characters, which a terminal obeys; signs that turn the direction of the text; halves of a character.
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` as it reads, also where it is drawn as HTML or Markdown: no tag, no picture, no hidden link.

    What would be markup gets an invisible character inside, unseen characters are written out (\\x1b). Ordinary text
    comes back unchanged, and so does text that was here before.
    """
    text = UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)
    return MARKUP.sub(lambda found: found[0] + WORD_JOINER, text)


def show(text: str) -> None:
    """Writes a line on the node that is executing, in the page that runs it; outside a running server nothing happens."""
    # Imported late: without a server, as in tests, the second would start half of one.
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    if context is None:
        return
    from server import PromptServer

    server = PromptServer.instance
    # To no client in particular would be to all pages that are open, with whatever node has this id there.
    if server.client_id is not None:
        server.send_progress_text(plain(text), context.node_id, server.client_id)


def for_pages(node: type) -> type:
    """`node` itself, a ComfyNode: from here on its texts are plain, results and errors too, and its report stays."""
    node.execute = classmethod(_plain_execute(node.execute.__func__))
    node.define_schema = classmethod(_lasting_report(node.define_schema.__func__))
    return node


def _plain_execute(execute):
    @functools.wraps(execute)
    def plain_execute(cls, *args, **kwargs):
        try:
            output = execute(cls, *args, **kwargs)
        except Exception as error:
            if (text := plain(str(error))) == str(error):
                raise
            raise ValueError(text).with_traceback(error.__traceback__) from None
        output.args = tuple(map(_plain_in, output.args))
        if output.ui is not None:
            told = output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
            output.ui = {kind: _plain_in(value) for kind, value in told.items()}
        return output

    return plain_execute


def _plain_in(value: Any) -> Any:
    """A text, or a list of texts, made plain; all else is handed on as it is."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        return type(value)(map(plain, value))
    return value


def _lasting_report(define_schema):
    @functools.wraps(define_schema)
    def define(cls):
        schema = define_schema(cls)
        # A newer ComfyUI then sends the report of a cached node too, as a page needs that was loaded anew.
        if hasattr(schema, "has_intermediate_output") and any(one.display_name == "report" for one in schema.outputs):
            schema.has_intermediate_output = True
        return schema

    return define
