"""The way of texts into pages.

They hold names out of files and workflows, strangers' too, and there are pages that draw text as HTML or as Markdown.
So every text passes `plain` on its way out: here, and for reports and errors in reports.py.
"""

import re

# Nobody sees it, and after it HTML and Markdown take the character before it for a letter like any other.
WORD_JOINER = "\u2060"
TOLD = "lcm_kit.told"  # the event that web/report.js listens for
MARKUP = re.compile(
    r"""<(?=[a-zA-Z/!?]|\Z)           # a tag, a comment; at the end somebody may add the rest
    | &(?=\#|\w+;)                    # &lt;
    | !(?=\[) | \](?=\()              # Markdown: ![picture](address), [words](address)
    | \[(?=\[)                        # [[words|address]] of ComfyUI's progress texts
    | ^[ ]{0,3}\[(?=[^\]\n]*\]:)      # [words]: address
    """,
    re.VERBOSE | re.MULTILINE,
)
NO_BREAK = "\u00a0"  # a space that Markdown and HTML draw wherever it stands
GAP = re.compile(r"^ +| +(?= )")  # the last space of a gap inside a line stays: there the line may be wrapped
# What makes a heading, a list, a quotation, a rule, code or a table of a line that begins with it.
BLOCK = re.compile(r"^(?=#{1,6}(?: |$)|[-+*](?: |$)|\d{1,9}[.)](?: |$)|>|\||~~~|[-=:|_* \u00a0]+$)")
# Control characters, which a terminal obeys; signs that turn the direction of the text; halves of a character.
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` as it reads, also where it is drawn as HTML or Markdown: no tag, no picture, no hidden link.

    What would be markup gets an invisible character inside, unseen characters are written out (\\x1b). Ordinary text
    comes back unchanged, and so does text that was here before.
    """
    text = UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)
    return MARKUP.sub(lambda found: found[0] + WORD_JOINER, text)


def in_lines(text: str) -> str:
    """`text` as it reads, also where it is drawn as Markdown: each of its lines is a line there too, its gaps are as wide.

    Markdown joins lines unless two spaces stand before the break, makes code of a line that begins with four, and draws
    several spaces as one. In plain text what is done about it is unseen. Text that was here before comes back unchanged.
    """
    lines = [GAP.sub(lambda gap: NO_BREAK * len(gap[0]), line.rstrip(" ")) for line in text.split("\n")]
    return re.sub(r"(?<=[^\n])\n(?=[^\n])", "  \n", "\n".join(BLOCK.sub(WORD_JOINER, line) for line in lines))


def show(text: str) -> None:
    """Writes a line on the node that is executing, in the page that runs it; outside a running server nothing happens."""
    server, context = _running()
    if server is not None:
        server.send_progress_text(plain(text), context.node_id, server.client_id)


def report_elsewhere(lines: list[str]) -> None:
    """Shows a report on the node that is executing, another pack's, in the page that runs it."""
    server, context = _running()
    if server is not None:
        told = {"node": context.node_id, "prompt_id": context.prompt_id, "text": [plain("\n".join(lines))]}
        server.send_sync(TOLD, told, server.client_id)


def executing():
    """ComfyUI's context of the node that is executing (prompt_id, node_id, list_index), or None."""
    # Imported late: without a server, as in tests, server.py would start half of one.
    from comfy_execution.utils import get_executing_context

    return get_executing_context()


def _running():
    """(server, context) of the node that is executing; (None, None) where no page runs it."""
    context = executing()
    if context is None:
        return None, None
    from server import PromptServer

    server = PromptServer.instance
    # To no client in particular would be to all pages that are open, with whatever node has this id there.
    return (None, None) if server.client_id is None else (server, context)
