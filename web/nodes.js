// What the page shows of LCM Kit's nodes beyond their definitions: fields that a connected preset replaces are off,
// strengths are called after the file of their LoRA, and our types have colours. Nothing of it is saved or sent.
import { app } from "../../scripts/app.js";

const OURS = /^LCMKit/; // node ids
const WIDE = /^LCMKit(CompareLoRA|Grid)$/;
const SWITCHED_OFF = new Set([2, 4]); // modes of a node: never, bypassed
const COLOURS = { LORA_MODEL: "#e58fb1", LORA_STACK: "#b07fd6", LCM_PRESET: "#e8b04a" };

// The node that an input gets its value from, through reroutes and into nothing that is switched off.
function sourceOf(node, name) {
  const at = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  const link = at < 0 ? null : node.inputs[at].link;
  if (link == null) return null;
  let source = node.getInputNode(at);
  for (let hops = 0; source?.type === "Reroute" && hops < 50; hops += 1) source = source.getInputNode(0);
  return SWITCHED_OFF.has(source?.mode) ? null : (source ?? "the edge of a subgraph");
}

// A field that is off, as where a link brings its value.
function setOff(node, names, off) {
  for (const widget of node.widgets ?? []) {
    if (!names.includes(widget.name)) continue;
    if (Boolean(widget.disabled) !== off) widget.disabled = off;
    // Older Nodes 2.0 look here.
    if (widget.options && Boolean(widget.options.disabled) !== off) widget.options.disabled = off;
  }
}

function switchOff(node) {
  for (const [input, names] of Object.entries(node.constructor.lcmKitReplaces ?? {})) {
    setOff(node, names, sourceOf(node, input) !== null);
  }
}

// What a LoRA is called: its file, or the node that makes it.
function nameOf(source) {
  const file = source?.widgets?.find((widget) => widget.name === "lora_name")?.value;
  return typeof file === "string" ? file.split(/[\\/]/).pop().replace(/\.safetensors$/, "") : source?.title;
}

// strength_2 is called after what is connected to lora_2.
function nameStrengths(node) {
  for (const widget of node.widgets ?? []) {
    const [, number] = widget.name.match(/^strength_(\d+)$/) ?? [];
    if (!number) continue;
    const name = nameOf(sourceOf(node, `lora_${number}`));
    const label = name ? `strength_${number}: ${name}` : undefined;
    if (widget.label !== label) widget.label = label;
  }
}

function* nodesOf(graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  for (const node of graph.nodes ?? graph._nodes ?? []) {
    yield node;
    yield* nodesOf(node.subgraph, seen);
  }
}

let waiting = false;
function refresh() {
  waiting = false;
  for (const node of nodesOf(app.rootGraph ?? app.graph)) {
    if (!OURS.test(node.comfyClass ?? node.type ?? "")) continue;
    switchOff(node);
    nameStrengths(node);
  }
  app.canvas?.setDirty?.(true, true);
}

function refreshSoon() {
  if (!waiting) setTimeout(refresh, 0);
  waiting = true;
}

// A palette that names our types goes before: it sets these entries, and an empty text where it does not.
function giveColours() {
  for (const [type, colour] of Object.entries(COLOURS)) {
    for (const table of [app.canvas?.default_connection_color_byType, app.canvas?.constructor.link_type_colors]) {
      if (!table) continue;
      let chosen = table[type];
      Object.defineProperty(table, type, {
        get: () => chosen || colour,
        set: (value) => (chosen = value),
        enumerable: true,
        configurable: true,
      });
    }
  }
  const style = document.createElement("style"); // of Nodes 2.0
  const rules = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`);
  style.textContent = `:root { ${rules.join(" ")} }`;
  document.head.append(style);
}

app.registerExtension({
  name: "lcm-kit.nodes",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!OURS.test(nodeData.name)) return;
    const inputs = { ...nodeData.input?.required, ...nodeData.input?.optional };
    nodeType.lcmKitReplaces = Object.fromEntries(
      Object.entries(inputs).flatMap(([name, [, options]]) => (options?.replaces ? [[name, options.replaces]] : [])),
    );
    const changed = nodeType.prototype.onConnectionsChange;
    nodeType.prototype.onConnectionsChange = function () {
      const result = changed?.apply(this, arguments);
      refreshSoon();
      return result;
    };
    // The page remembers a field that is off by the node's number, and the next workflow may have it too.
    const removed = nodeType.prototype.onRemoved;
    nodeType.prototype.onRemoved = function () {
      setOff(this, Object.values(nodeType.lcmKitReplaces).flat(), false);
      return removed?.apply(this, arguments);
    };
  },
  setup() {
    giveColours();
    // Whatever is changed by hand: a node switched off, another file chosen.
    for (const type of ["pointerup", "keyup", "change"]) document.addEventListener(type, refreshSoon, true);
    refreshSoon();
  },
  nodeCreated(node) {
    // A picture that is looked at on its node.
    if (WIDE.test(node.comfyClass ?? "")) node.setSize([Math.max(node.size[0], 520), node.size[1]]);
    refreshSoon();
  },
  afterConfigureGraph: refreshSoon,
});
