// Answers as Markdown. Every element is made here by its name and filled with text: nothing of an answer is read as HTML,
// no address in it is followed or loaded.
import { chipOf, findBoxes } from "./boxes.js";

const DEEPEST = 6; // lists and quotes inside each other; what is deeper stays text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.+?)\s*#*\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^(\s*)([-*+\u2022]|\d{1,9}[.)])\s+(\S.*)$/; // "42." alone is an answer, no list
const QUOTE = /^ {0,3}>\s?(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = new RegExp(
  [
    /(?<tick>`+)(?<code>[^`](?:.{0,600}?[^`])??)\k<tick>(?!`)/,
    /(?<two>\*\*|__)(?=\S)(?<strong>.{1,600}?)(?<=\S)\k<two>/,
    /(?<![*\w])\*(?=[^\s*])(?<em>[^*\n]{1,600}?)(?<=\S)\*(?![*\w])/,
    /(?<![_\w])_(?=[^\s_])(?<under>[^_\n]{1,600}?)(?<=\S)_(?![_\w])/,
    /~~(?=\S)(?<del>.{1,600}?)(?<=\S)~~/,
  ].map((one) => one.source).join("|"),
  "gs",
);
const MARK = /\uE000(\d+)\uE001/g; // a group of boxes, while the text is read

function make(kind, children = []) {
  const node = document.createElement(kind);
  node.append(...children);
  return node;
}

/** Fill `node` with a text; returns the groups of boxes in it, which are marked. */
export function writeAnswer(node, text) {
  const groups = findBoxes(text);
  let [marked, end] = ["", 0];
  groups.forEach((group, index) => {
    marked += `${text.slice(end, group.start)}\uE000${index}\uE001`;
    end = group.end;
  });
  marked += text.slice(end);
  node.replaceChildren(...new Reading(groups).blocks(marked.split("\n"), 0));
  return groups;
}

class Reading {
  constructor(groups) {
    this.groups = groups;
  }

  /** Text whose groups of boxes are chips. */
  plain(text) {
    const nodes = [];
    let end = 0;
    for (const found of text.matchAll(MARK)) {
      const group = this.groups[Number(found[1])];
      if (!group) continue;
      nodes.push(text.slice(end, found.index), chipOf(group));
      end = found.index + found[0].length;
    }
    nodes.push(text.slice(end));
    return nodes.filter((one) => one !== "");
  }

  inline(text, depth = 0) {
    const nodes = [];
    let end = 0;
    for (const found of depth > DEEPEST ? [] : text.matchAll(INLINE)) {
      const { code, strong, em, under, del } = found.groups;
      const inner = strong ?? em ?? under ?? del;
      const kind = strong !== undefined ? "strong" : del !== undefined ? "del" : "em";
      nodes.push(...this.plain(text.slice(end, found.index)));
      nodes.push(code !== undefined ? make("code", this.plain(code)) : make(kind, this.inline(inner, depth + 1)));
      end = found.index + found[0].length;
    }
    return [...nodes, ...this.plain(text.slice(end))];
  }

  /** The elements of some lines. */
  blocks(lines, depth) {
    const nodes = [];
    let at = 0;
    while (at < lines.length) {
      const [node, next] = this.block(lines, at, depth);
      if (node) nodes.push(node);
      at = next;
    }
    return nodes;
  }

  /** The element that begins at a line, null for none, and the line behind it. */
  block(lines, at, depth) {
    const line = lines[at];
    if (!line.trim()) return [null, at + 1];
    if (FENCE.test(line)) return this.fenced(lines, at);
    const heading = line.match(HEADING);
    if (heading) return [make(`h${Math.min(6, heading[1].length + 2)}`, this.inline(heading[2])), at + 1];
    if (RULE.test(line)) return [make("hr"), at + 1];
    if (this.opensTable(lines, at)) return this.table(lines, at);
    if (depth < DEEPEST && QUOTE.test(line)) return this.quote(lines, at, depth);
    if (depth < DEEPEST && ITEM.test(line)) return this.list(lines, at, depth);
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && !this.opens(lines, end, depth)) end += 1;
    return [make("p", this.inline(lines.slice(at, end).join("\n").trim())), end];
  }

  opens(lines, at, depth) {
    const inner = depth < DEEPEST && (QUOTE.test(lines[at]) || ITEM.test(lines[at]));
    const own = [FENCE, HEADING, RULE].some((one) => one.test(lines[at]));
    return own || inner || this.opensTable(lines, at);
  }

  fenced(lines, at) {
    const [, fence] = lines[at].match(FENCE);
    const close = lines.findIndex((line, index) => index > at && line.trim().startsWith(fence) && FENCE.test(line));
    const end = close < 0 ? lines.length : close;
    const code = make("code", this.plain(lines.slice(at + 1, end).join("\n")));
    return [make("pre", [code]), end + 1];
  }

  quote(lines, at, depth) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    const inner = lines.slice(at, end).map((line) => line.match(QUOTE)[1]);
    return [make("blockquote", this.blocks(inner, depth + 1)), end];
  }

  list(lines, at, depth) {
    const [, indent, sign] = lines[at].match(ITEM);
    const ordered = /\d/.test(sign);
    const node = make(ordered ? "ol" : "ul");
    if (ordered) node.start = Number.parseInt(sign, 10);
    let end = at;
    while (end < lines.length) {
      const item = lines[end].match(ITEM);
      if (!item || /\d/.test(item[2]) !== ordered || item[1].length > indent.length + 1) break;
      const inner = [item[3]];
      end += 1;
      while (end < lines.length && this.belongs(lines, end, indent.length)) inner.push(dedented(lines[end++], indent.length + 2));
      node.append(make("li", this.blocks(inner, depth + 1)));
      const next = lines.slice(end).findIndex((line) => line.trim());
      if (next > 0 && ITEM.test(lines[end + next])) end += next; // an empty line between two items
    }
    return [node, end];
  }

  /** Whether a line goes on with the item of a list that is so far indented. */
  belongs(lines, at, indent) {
    const line = lines[at];
    if (line.trim()) return line.search(/\S/) > indent || !this.opens(lines, at, 0);
    const next = lines.slice(at).find((one) => one.trim());
    return next !== undefined && next.search(/\S/) > indent;
  }

  opensTable(lines, at) {
    const next = lines[at + 1] ?? "";
    return lines[at].includes("|") && next.includes("-") && DIVIDER.test(next) && cells(next).length === cells(lines[at]).length;
  }

  table(lines, at) {
    const wide = cells(lines[at]).length;
    const rowOf = (line, kind) =>
      make("tr", Array.from({ length: wide }, (_, column) => make(kind, this.inline(cells(line)[column] ?? ""))));
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|")) end += 1;
    const body = make("tbody", lines.slice(at + 2, end).map((line) => rowOf(line, "td")));
    const frame = make("div", [make("table", [make("thead", [rowOf(lines[at], "th")]), body])]);
    frame.className = "table";
    return [frame, end];
  }
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function dedented(line, most) {
  return line.slice(Math.min(most, Math.max(0, line.search(/\S|$/))));
}
