// Boxes and points in answers, in every notation of the grounding data (docs/grounding.md), and the image with them on it.
const COLORS = ["#ef4444", "#22a45d", "#3b82f6", "#d99a00", "#a855f7", "#f97316"];

const DECIMAL = String.raw`(?:\d(?:\.\d*)?|\.\d+)`;
const WHOLE = String.raw`\d{1,4}`;
const listed = (number, count) => Array(count).fill(number).join(String.raw`\s*,\s*`);
const row = (one, joint) => `${one}(?:${joint}${one})*`;
const bins = (kind, count) => `<${kind}_st>${row(String.raw`(?:<bin_\d+>\s*){${count}}`, `<${kind}_sep>`)}<${kind}_ed>`;
const hundredths = (count) => row(String.raw`\{(?:<\d{1,3}>){${count}}\}`, String.raw`\s*<delim>\s*`);

/** [pattern, numbers of an entry, how many steps a side has]. Marks that tokenizers count as special, and leave out of
 * the text, are not needed where the rest is enough. */
const FORMS = [
  [String.raw`\[\s*${row(listed(DECIMAL, 4), String.raw`\s*;\s*`)}\s*\]`, 4, 1],
  [String.raw`\(\s*${row(listed(DECIMAL, 4), String.raw`\s*;\s*`)}\s*\)`, 4, 1],
  [String.raw`\[\s*${row(listed(DECIMAL, 2), String.raw`\s*;\s*`)}\s*\]`, 2, 1],
  [String.raw`\(\s*${row(listed(DECIMAL, 2), String.raw`\s*;\s*`)}\s*\)`, 2, 1],
  [bins("b", 4), 4, 1000],
  [bins("p", 2), 2, 1000],
  [hundredths(4), 4, 100],
  [hundredths(2), 2, 100],
  [row(String.raw`(?:<\|box_start\|>)?\(${listed(WHOLE, 2)}\),\(${listed(WHOLE, 2)}\)(?:<\|box_end\|>)?`, ""), 4, 1000],
  [row(String.raw`<\|box_start\|>\(${listed(WHOLE, 2)}\)<\|box_end\|>`, ""), 2, 1000],
  [String.raw`(?:<box>)?\[${row(String.raw`\[${listed(WHOLE, 4)}\]`, String.raw`\s*,\s*`)}\](?:</box>)?`, 4, 1000],
  [String.raw`<box>\[${row(String.raw`\[${listed(WHOLE, 2)}\]`, String.raw`\s*,\s*`)}\]</box>`, 2, 1000],
].map(([pattern, size, steps]) => ({ pattern: new RegExp(pattern, "g"), size, steps }));

const POINTS = /^[[(]\s*(?:\d?\.\d{2,}\s*[,;]?\s*)+[\])]$/;

/** What stands in front of boxes and says whose they are. */
const NAME = /(?:<p>([^<]{1,99})<\/p>|<ref>([^<]{1,99})<\/ref>|<\|object_ref_start\|>([^<]{1,99})<\|object_ref_end\|>)\s*$/;

function fits(entry) {
  if (Math.max(...entry) > 1) return false;
  return entry.length === 2 || (entry[0] < entry[2] && entry[1] < entry[3]);
}

function groupOf(raw, size, steps) {
  const numbers = raw.match(/\d*\.\d+|\d+/g).map((number) => Number(number) / steps);
  const entries = [];
  for (let at = 0; at < numbers.length; at += size) entries.push(numbers.slice(at, at + size));
  // (0.2, 0.8) is a range more often than a place: points have two decimals or more.
  return size === 2 && steps === 1 && !POINTS.test(raw) ? [] : entries.filter(fits);
}

/** The groups of a text in its order: [{start, end, raw, name, number, color, entries}], entries as fractions, a box
 * [x0, y0, x1, y1] or a point [x, y]. */
export function findBoxes(text) {
  const found = [];
  for (const { pattern, size, steps } of FORMS) {
    for (const match of text.matchAll(pattern)) {
      const entries = groupOf(match[0], size, steps);
      if (entries.length) found.push({ start: match.index, end: match.index + match[0].length, raw: match[0], entries });
    }
  }
  found.sort((one, other) => one.start - other.start || other.end - one.end);
  const groups = [];
  let end = 0;
  for (const group of found) {
    if (group.start < end) continue; // inside another notation's
    const named = text.slice(Math.max(end, group.start - 150), group.start).match(NAME);
    const name = named ? named.slice(1).find(Boolean).trim() : "";
    end = group.end;
    const start = group.start - (named ? named[0].length : 0);
    groups.push({ ...group, start, name, number: groups.length + 1, color: COLORS[groups.length % COLORS.length] });
  }
  return groups;
}

/** What stands in the text for a group. */
export function chipOf(group) {
  const chip = document.createElement("span");
  chip.className = "chip";
  chip.dataset.group = group.number;
  chip.style.borderColor = group.color;
  chip.title = group.raw;
  const number = document.createElement("b");
  number.textContent = group.number;
  number.style.background = group.color;
  chip.append(number, group.name || group.raw);
  return chip;
}

/** A fraction of the image padded to a square, as a fraction of the image. */
function unpadded(value, side, longest) {
  return (value * longest - (longest - side) / 2) / side;
}

function place(frame, entry, image, padded) {
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const longest = Math.max(width, height);
  const shown = entry.map((value, at) => {
    const own = padded ? unpadded(value, at % 2 ? height : width, longest) : value;
    return Math.min(1, Math.max(0, own)) * 100;
  });
  const [x0, y0, x1 = x0, y1 = y0] = shown;
  Object.assign(frame.style, { left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` });
}

/** The image with groups of boxes on it. `padded`: they count from the image padded to a square. */
export function drawBoxes(address, groups, padded) {
  const figure = document.createElement("figure");
  figure.className = "drawn";
  const image = document.createElement("img");
  image.alt = "";
  figure.append(image);
  for (const group of groups) {
    for (const entry of group.entries) {
      const frame = document.createElement("i");
      frame.className = entry.length === 2 ? "point" : "";
      frame.dataset.group = group.number;
      frame.style.borderColor = group.color;
      const label = document.createElement("b");
      label.textContent = group.name || group.number;
      label.style.background = group.color;
      frame.append(label);
      figure.append(frame);
      image.addEventListener("load", () => place(frame, entry, image, padded));
    }
  }
  image.src = address;
  return figure;
}

/** Pointing at a group in the text makes its boxes stand out, and the other way round. */
export function joinBoxes(card) {
  for (const node of card.querySelectorAll("[data-group]")) {
    const own = [...card.querySelectorAll(`[data-group="${node.dataset.group}"]`)];
    node.addEventListener("mouseenter", () => own.forEach((one) => one.classList.add("lit")));
    node.addEventListener("mouseleave", () => own.forEach((one) => one.classList.remove("lit")));
  }
}
