"""The last stage of a merge: the LoRA and its account, out of what was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..files.lora import Lora
from ..metadata.fields import ARCHITECTURE, MERGED_FROM, PROVENANCE_KEY
from ..naming import names
from ..recognise.identity import architecture_of
from .account import Account, account_of
from .compute import Computed
from .plan import Plan
from .provenance import to_json


def outcome(plan: Plan, computed: Computed, sha256: Sequence[str | None] = ()) -> tuple[Lora, Account]:
    """(merged LoRA, with its provenance in the metadata; account). sha256: of the inputs' files, as many as are known."""
    digests = [*sha256, *[None] * (len(plan.loras) - len(sha256))]
    account = account_of(plan, computed.tally, digests)
    notes = {
        **plan.metadata,
        PROVENANCE_KEY: to_json(account),
        MERGED_FROM: ", ".join(lora.source for lora in plan.sharing or plan.loras),
    }
    inputs = zip(plan.loras, plan.strengths.base, strict=True)
    passed = plan.passthrough.updates
    used = {*computed.layers, *passed, *(module for module, _ in computed.diffs)}
    merged = Lora(
        modules=computed.layers,
        diffs=computed.diffs,
        spellings=names.tidy({module: name for module, name in plan.spellings.items() if module in used}),
        metadata=notes,
        source=" + ".join(f"{lora.source} * {strength:g}" for lora, strength in inputs),
        carried=passed,
    )
    if plan.names_architecture and (architecture := architecture_of(merged)):
        merged = replace(merged, metadata={**notes, ARCHITECTURE: architecture})
    return merged, account
