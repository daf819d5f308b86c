// The page: a conversation, what is asked next, and the history.
import { modelNames, streamAnswer } from "./api.js";
import { dropTalk, keepTalk, loadTalks } from "./store.js";
import { answerCard, emptyBlock, fillCard, historyRow, make, questionBlock, waitingImage } from "./view.js";
import { showWords, switchLanguage, word } from "./words.js";

const at = (id) => document.getElementById(id);
const PARAMETERS = ["temperature", "top_p", "max_tokens", "seed"];
const KEPT = [...PARAMETERS, "system"]; // in this browser
const NEAR = 80; // pixels from the end of the conversation within which it is followed
let talks = [];
let talk = null;
let waiting = [];
let running = null;
let models = [];
let wished = new URLSearchParams(location.search); // /?model=NAME&second=NAME

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function freshTalk() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), changed: Date.now(), turns: [] };
}

// ---- what is shown

function showTurn(turn, index) {
  const last = index === talk.turns.length - 1;
  const seen = talk.turns.slice(0, index + 1).flatMap((one) => one.images).at(-1);
  const again = last && !running ? () => ask(turn) : null;
  const answers = make("div", "answers");
  for (const answer of turn.answers) {
    answer.card = answerCard(answer, { seen, padded: at("padded").checked, again });
    answers.append(answer.card);
  }
  return [questionBlock(turn, running ? null : () => editTurn(index)), answers];
}

/** Everything anew; `follow` false: where the reader is stays in view. */
function show(follow = true) {
  const before = at("turns").scrollTop;
  const nodes = talk.turns.flatMap(showTurn);
  if (!nodes.length) nodes.push(emptyBlock(choose));
  at("turns").replaceChildren(...nodes);
  if (follow) toEnd();
  else at("turns").scrollTop = before;
  at("stop").hidden = !running;
  at("send").hidden = Boolean(running);
  showHistory();
}

function toEnd() {
  at("turns").scrollTop = at("turns").scrollHeight;
}

function isAtEnd() {
  return at("turns").scrollHeight - at("turns").scrollTop - at("turns").clientHeight < NEAR;
}

function showHistory() {
  const rows = talks.map((one) => historyRow(one, one === talk, () => openTalk(one), () => removeTalk(one)));
  at("history").replaceChildren(...rows);
}

function showWaiting() {
  const without = (index) => () => {
    waiting.splice(index, 1);
    showWaiting();
  };
  at("images").replaceChildren(...waiting.map((address, index) => waitingImage(address, without(index))));
}

// ---- asking

/** The messages before and with `turn`, as the model in column `column` knows them. Turns without an answer are left out. */
function messagesOf(turn, column) {
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
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

/** Shows an answer's text at most once a frame. */
function shower(answer) {
  let planned = false;
  return () => {
    if (planned) return;
    planned = true;
    requestAnimationFrame(() => {
      planned = false;
      const follow = isAtEnd();
      if (answer.busy) fillCard(answer.card, answer);
      if (follow) toEnd();
    });
  };
}

async function fill(answer, turn, column) {
  const body = { ...parameters(), model: answer.model, messages: messagesOf(turn, column) };
  const [start, showSoon] = [performance.now(), shower(answer)];
  try {
    for await (const { text, tokens } of streamAnswer(body, at("token").value, running.signal)) {
      answer.text += text;
      if (tokens) answer.tokens = tokens;
      showSoon();
    }
    answer.seconds = (performance.now() - start) / 1000;
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
  await keep(own); // so that a page that is closed meanwhile has the question
  await Promise.all(turn.answers.map((answer, column) => fill(answer, turn, column)));
  running = null;
  own.changed = Date.now();
  await keep(own);
  show(isAtEnd());
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
  setText(""); // without the focus, which would bring a phone's keyboard back over the answer
  showWaiting();
  await ask(turn);
}

function editTurn(index) {
  const [turn] = talk.turns.splice(index);
  waiting = [...turn.images];
  showWaiting();
  show();
  choose(turn.text);
}

function setText(text) {
  at("text").value = text;
  fitText();
}

/** A text to ask, which may be changed before it is sent. */
function choose(text) {
  setText(text);
  at("text").focus();
}

// ---- history, images, models

function openTalk(one) {
  if (running) return;
  talk = one;
  at("side").classList.remove("open");
  show();
  if (!one.turns.length) at("text").focus();
}

async function removeTalk(one) {
  if (running) return;
  talks = talks.filter((other) => other !== one);
  await dropTalk(one.id);
  if (talk === one) talk = freshTalk();
  show();
}

/** What a page that was closed in the middle of an answer has kept. */
function settledTalk(one) {
  for (const answer of one.turns.flatMap((turn) => turn.answers)) {
    if (answer.busy) Object.assign(answer, { busy: false, stopped: true });
  }
  return one;
}

async function addImages(files) {
  notice("");
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

function showPanel(shown) {
  at("panel").hidden = !shown;
  at("settings").setAttribute("aria-expanded", String(shown));
}

function askForToken() {
  showPanel(true);
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
  const [first, second] = ["model", "second"].map((id) => wished?.get(id) ?? at(id).value);
  wished = null;
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

function listenToKeys() {
  at("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !at("large").open) running?.abort();
    if (event.altKey && event.code === "KeyN") openTalk(freshTalk());
  });
}

function listenToImages() {
  at("attach").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", async () => {
    await addImages([...at("file").files]);
    at("file").value = "";
  });
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
  at("large").addEventListener("click", () => at("large").close());
}

function listen() {
  at("send").addEventListener("click", send);
  at("stop").addEventListener("click", () => running?.abort());
  at("new").addEventListener("click", () => openTalk(freshTalk()));
  at("menu").addEventListener("click", () => at("side").classList.toggle("open"));
  document.querySelector("main").addEventListener("click", (event) => {
    if (!at("menu").contains(event.target)) at("side").classList.remove("open");
  });
  at("settings").addEventListener("click", () => showPanel(at("panel").hidden));
  at("language").addEventListener("click", () => { switchLanguage(); showModels(); showWaiting(); show(); });
  at("theme").addEventListener("click", () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", other);
    setTheme(other);
  });
  at("text").addEventListener("input", fitText);
  at("token").addEventListener("change", findModels);
  for (const name of KEPT) {
    at(name).value = localStorage.getItem(name) ?? "";
    at(name).addEventListener("change", () => localStorage.setItem(name, at(name).value));
  }
  at("padded").checked = localStorage.getItem("padded") === "true";
  at("padded").addEventListener("change", () => {
    localStorage.setItem("padded", String(at("padded").checked));
    if (!running) show();
  });
  listenToKeys();
  listenToImages();
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(localStorage.getItem("theme") ?? (dark ? "dark" : "light"));
  showWords();
  listen();
  talk = freshTalk();
  show();
  try {
    talks = (await loadTalks()).map(settledTalk);
  } catch (error) {
    notice(`${word("not_kept")}: ${error.message}`);
  }
  if (talks.length && !talk.turns.length) talk = talks[0];
  show();
  await findModels();
}

start();
