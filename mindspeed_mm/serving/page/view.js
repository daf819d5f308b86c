// What is seen of a conversation: elements only, no state.
import { drawBoxes, joinBoxes } from "./boxes.js";
import { writeAnswer } from "./markdown.js";
import { word } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const EXAMPLES = ["describe", "read", "find"];

export function make(kind, name, text = "") {
  const node = document.createElement(kind);
  node.className = name;
  node.textContent = text;
  return node;
}

function icon(name) {
  const [node, use] = [document.createElementNS(SVG, "svg"), document.createElementNS(SVG, "use")];
  use.setAttribute("href", `#i-${name}`);
  node.append(use);
  return node;
}

/** A button; without a `text`, `label` is what it is called. */
export function button(text, action, { image = null, label = "", name = "" } = {}) {
  const node = make("button", name);
  if (image) node.append(icon(image));
  if (text) node.append(make("span", "", text));
  if (label) {
    node.title = label;
    node.setAttribute("aria-label", label);
  }
  node.addEventListener("click", action);
  return node;
}

/** An image that is shown large when it is clicked or chosen by the keyboard. */
export function imageAt(address) {
  const node = document.createElement("img");
  node.src = address;
  node.alt = "";
  const frame = make("button", "thumb");
  frame.title = word("enlarge");
  frame.setAttribute("aria-label", word("enlarge"));
  frame.append(node);
  frame.addEventListener("click", () => enlarge(address));
  return frame;
}

function enlarge(address) {
  const large = document.getElementById("large");
  large.querySelector("img").src = address;
  large.showModal();
}

/** An answer's text into its card. */
export function fillCard(card, answer) {
  return writeAnswer(card.querySelector(".text"), answer.text);
}

function facts(answer) {
  const found = [];
  if (answer.stopped) found.push(word("stopped"));
  if (answer.tokens) found.push(`${answer.tokens} ${word("tokens")}`);
  if (answer.seconds) found.push(`${answer.seconds.toFixed(1)} s`);
  return found.join(" \u00b7 ");
}

/** The card of an answer. `seen`: the image that its boxes are on; `again`: what Regenerate does, null for none. */
export function answerCard(answer, { seen, padded, again }) {
  const card = make("article", answer.busy ? "answer busy" : "answer");
  const name = make("div", "name");
  name.append(make("span", "mark"), make("b", "", answer.model), make("span", "facts", facts(answer)));
  card.append(name, make("div", "text"));
  const groups = fillCard(card, answer);
  if (groups.length && seen && !answer.busy) card.append(drawBoxes(seen, groups, padded));
  if (answer.error) card.append(make("div", "error", answer.error));
  if (!answer.busy) card.append(answerTools(answer, again));
  joinBoxes(card);
  return card;
}

function answerTools(answer, again) {
  const tools = make("div", "tools");
  if (navigator.clipboard) {
    const copy = button(word("copy"), async () => {
      await navigator.clipboard.writeText(answer.text);
      copy.querySelector("span").textContent = word("copied");
    }, { image: "copy" });
    tools.append(copy);
  }
  if (again) tools.append(button(word("again"), again, { image: "again" }));
  return tools;
}

/** A question. `edit`: what Edit does, null for none. */
export function questionBlock(turn, edit) {
  const block = make("div", "user");
  const thumbs = make("div", "thumbs");
  thumbs.append(...turn.images.map(imageAt));
  if (turn.images.length) block.append(thumbs);
  if (turn.text) block.append(make("div", "bubble text", turn.text));
  const tools = make("div", "tools");
  if (edit) tools.append(button(word("edit"), edit, { image: "edit" }));
  block.append(tools);
  return block;
}

/** What stands where nothing was asked yet; `choose` gets the text of an example. */
export function emptyBlock(choose) {
  const block = make("div", "empty");
  const examples = make("div", "examples");
  for (const name of EXAMPLES) examples.append(button(word(name), () => choose(word(name))));
  block.append(make("span", "mark"), make("h1", "", word("title")), make("div", "", word("start")), examples);
  return block;
}

/** A conversation in the history. */
export function historyRow(talk, isOpen, open, remove) {
  const row = make("div", isOpen ? "now" : "");
  const title = button(talk.turns[0]?.text || word("you"), open);
  if (isOpen) title.setAttribute("aria-current", "true");
  row.append(title, button("", remove, { image: "remove", label: word("remove"), name: "icon" }));
  return row;
}

/** An image that goes with the next question. */
export function waitingImage(address, remove) {
  const node = make("span", "");
  node.append(imageAt(address), button("", remove, { image: "remove", label: word("remove"), name: "icon" }));
  return node;
}
