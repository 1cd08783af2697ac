"""Text on a node, while it runs and afterwards."""

from comfy_execution.utils import get_executing_context


def show(text: str) -> None:
    """Writes `text` on the node that is executing; outside a running server nothing happens."""
    context = get_executing_context()
    if context is None:
        return
    # Imported late: without a server, as in tests, this module would start half of one.
    # The page of ComfyUI 0.3.75 draws ui text for its own preview node only, this message for every node.
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, context.node_id)
