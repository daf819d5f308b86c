// The page: a conversation, what is asked next, and the history.
import { modelNames, streamAnswer } from "./api.js";
import { drawBoxes, writeText } from "./boxes.js";
import { dropTalk, keepTalk, loadTalks } from "./store.js";
import { showWords, switchLanguage, word } from "./words.js";

const at = (id) => document.getElementById(id);
const PARAMETERS = ["temperature", "top_p", "max_tokens", "seed"];
let talks = [];
let talk = null;
let waiting = [];
let running = null;
let models = [];

function make(kind, name, text = "") {
  const node = document.createElement(kind);
  node.className = name;
  node.textContent = text;
  return node;
}

function button(text, action) {
  const node = make("button", "", text);
  node.addEventListener("click", action);
  return node;
}

function imageAt(address) {
  const node = document.createElement("img");
  node.src = address;
  node.alt = "";
  return node;
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function freshTalk() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), changed: Date.now(), turns: [] };
}

// ---- what is shown

function showAnswer(answer, turn, index) {
  const card = make("div", answer.busy ? "answer busy" : "answer");
  const text = make("div", "text");
  const boxes = writeText(text, answer.text);
  card.append(make("div", "name", answer.stopped ? `${answer.model} (${word("stopped")})` : answer.model), text);
  const seen = talk.turns.slice(0, index + 1).flatMap((one) => one.images).at(-1);
  if (boxes.length && seen && !answer.busy) card.append(drawBoxes(seen, boxes));
  if (answer.error) card.append(make("div", "error", answer.error));
  if (!answer.busy) {
    const tools = make("div", "tools");
    const copy = button(word("copy"), async () => {
      await navigator.clipboard.writeText(answer.text);
      copy.textContent = word("copied");
    });
    if (navigator.clipboard) tools.append(copy);
    if (index === talk.turns.length - 1 && !running) tools.append(button(word("again"), () => ask(turn)));
    card.append(tools);
  }
  answer.card = card;
  return card;
}

function showTurn(turn, index) {
  const user = make("div", "user");
  const thumbs = make("div", "thumbs");
  thumbs.append(...turn.images.map(imageAt));
  user.append(thumbs);
  if (turn.text) user.append(make("div", "bubble text", turn.text));
  const tools = make("div", "tools");
  if (!running) tools.append(button(word("edit"), () => editTurn(index)));
  user.append(tools);
  const answers = make("div", "answers");
  answers.append(...turn.answers.map((answer) => showAnswer(answer, turn, index)));
  return [user, answers];
}

function show() {
  const nodes = talk.turns.flatMap(showTurn);
  if (!nodes.length) {
    const empty = make("div", "empty");
    empty.append(make("h1", "", word("title")), make("div", "", word("start")));
    nodes.push(empty);
  }
  at("turns").replaceChildren(...nodes);
  at("turns").scrollTop = at("turns").scrollHeight;
  at("stop").hidden = !running;
  at("send").hidden = Boolean(running);
  showHistory();
}

function showHistory() {
  const rows = talks.map((one) => {
    const row = make("div", one === talk ? "now" : "");
    const remove = button("\u00d7", () => removeTalk(one));
    remove.title = word("remove");
    row.append(button(one.turns[0]?.text || word("you"), () => openTalk(one)), remove);
    return row;
  });
  at("history").replaceChildren(...rows);
}

function showWaiting() {
  const nodes = waiting.map((address, index) => {
    const node = document.createElement("span");
    const remove = button("\u00d7", () => {
      waiting.splice(index, 1);
      showWaiting();
    });
    remove.title = word("remove");
    node.append(imageAt(address), remove);
    return node;
  });
  at("images").replaceChildren(...nodes);
}

// ---- asking

/** The messages before and with `turn`, as the model in column `column` knows them. Turns without an answer are left out. */
function messagesOf(turn, column) {
  const messages = [];
  for (const one of talk.turns) {
    const images = one.images.map((url) => ({ type: "image_url", image_url: { url } }));
    const content = images.length ? [...images, ...(one.text ? [{ type: "text", text: one.text }] : [])] : one.text;
    if (one === turn) return [...messages, { role: "user", content }];
    const answer = one.answers[column] ?? one.answers[0];
    if (!answer?.text) continue;
    messages.push({ role: "user", content }, { role: "assistant", content: answer.text });
  }
  return messages;
}

function parameters() {
  const found = {};
  for (const name of PARAMETERS) if (at(name).value !== "") found[name] = Number(at(name).value);
  if (found.temperature === 0) delete found.top_p; // greedy takes no part of the distribution
  return found;
}

async function fill(answer, turn, column) {
  const body = { ...parameters(), model: answer.model, messages: messagesOf(turn, column) };
  try {
    for await (const piece of streamAnswer(body, at("token").value, running.signal)) {
      answer.text += piece;
      writeText(answer.card.querySelector(".text"), answer.text);
      at("turns").scrollTop = at("turns").scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") answer.stopped = true;
    else answer.error = error.message;
    if (error.status === 401) askForToken();
  }
  answer.busy = false;
}

async function ask(turn) {
  const own = talk;
  running = new AbortController();
  const names = [at("model").value, at("second").value].filter(Boolean);
  turn.answers = names.map((model) => ({ model, text: "", busy: true }));
  if (!talks.includes(own)) talks.unshift(own);
  show();
  await Promise.all(turn.answers.map((answer, column) => fill(answer, turn, column)));
  running = null;
  own.changed = Date.now();
  await keep(own);
  show();
}

async function keep(own) {
  const answers = (turn) => turn.answers.map(({ card, ...rest }) => rest);
  try {
    await keepTalk({ ...own, turns: own.turns.map((turn) => ({ ...turn, answers: answers(turn) })) });
  } catch (error) {
    notice(`${word("not_kept")}: ${error.message}`);
  }
}

async function send() {
  const text = at("text").value.trim();
  if (running || (!text && !waiting.length)) return;
  if (!at("model").value) await findModels();
  if (!at("model").value) return;
  const turn = { text, images: waiting, answers: [] };
  talk.turns.push(turn);
  waiting = [];
  at("text").value = "";
  showWaiting();
  fitText();
  await ask(turn);
}

function editTurn(index) {
  const [turn] = talk.turns.splice(index);
  at("text").value = turn.text;
  waiting = [...turn.images];
  showWaiting();
  show();
  fitText();
  at("text").focus();
}

// ---- history, images, models

function openTalk(one) {
  if (running) return;
  talk = one;
  at("side").classList.remove("open");
  show();
}

async function removeTalk(one) {
  if (running) return;
  talks = talks.filter((other) => other !== one);
  await dropTalk(one.id);
  if (talk === one) talk = freshTalk();
  show();
}

async function addImages(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      notice(`${file.name} ${word("no_image")}`);
      continue;
    }
    const address = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
    waiting.push(address);
  }
  showWaiting();
}

function askForToken() {
  at("panel").hidden = false;
  notice(word("needs_token"));
  at("token").focus();
}

async function findModels() {
  try {
    models = await modelNames(at("token").value);
    notice("");
  } catch (error) {
    if (error.status === 401) askForToken();
    else notice(error.message);
    return;
  }
  showModels();
}

function showModels() {
  const [first, second] = [at("model").value, at("second").value];
  at("model").replaceChildren(...models.map((name) => new Option(name, name)));
  const beside = models.map((name) => new Option(`${word("beside")}: ${name}`, name));
  at("second").replaceChildren(new Option(word("none"), ""), ...beside);
  if (models.includes(first)) at("model").value = first;
  if (models.includes(second)) at("second").value = second;
}

// ---- the page's own state

function fitText() {
  at("text").style.height = "auto";
  at("text").style.height = `${at("text").scrollHeight}px`;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}

function listen() {
  at("send").addEventListener("click", send);
  at("stop").addEventListener("click", () => running?.abort());
  at("new").addEventListener("click", () => openTalk(freshTalk()));
  at("menu").addEventListener("click", () => at("side").classList.toggle("open"));
  document.querySelector("main").addEventListener("click", (event) => {
    if (event.target !== at("menu")) at("side").classList.remove("open");
  });
  at("settings").addEventListener("click", () => { at("panel").hidden = !at("panel").hidden; });
  at("attach").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", async () => {
    await addImages([...at("file").files]);
    at("file").value = "";
  });
  at("language").addEventListener("click", () => { switchLanguage(); showModels(); showWaiting(); show(); });
  at("theme").addEventListener("click", () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", other);
    setTheme(other);
  });
  at("text").addEventListener("input", fitText);
  at("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) addImages([...event.clipboardData.files]);
  });
  document.addEventListener("dragover", (event) => { event.preventDefault(); at("composer").classList.add("over"); });
  document.addEventListener("dragleave", () => at("composer").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    at("composer").classList.remove("over");
    addImages([...event.dataTransfer.files]);
  });
  at("token").addEventListener("change", findModels);
  for (const name of PARAMETERS) {
    at(name).value = localStorage.getItem(name) ?? "";
    at(name).addEventListener("change", () => localStorage.setItem(name, at(name).value));
  }
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(localStorage.getItem("theme") ?? (dark ? "dark" : "light"));
  showWords();
  listen();
  talk = freshTalk();
  show();
  try {
    talks = await loadTalks();
  } catch (error) {
    notice(`${word("not_kept")}: ${error.message}`);
  }
  if (talks.length && !talk.turns.length) talk = talks[0];
  show();
  await findModels();
}

start();
