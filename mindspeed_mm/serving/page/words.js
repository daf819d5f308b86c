// The page's words in its two languages.
const WORDS = {
  en: { new: "New conversation", history: "History", model: "Model", second: "Second model", none: "one model",
    beside: "beside", language: "中文", theme: "Light or dark", parameters: "Parameters", temperature: "Temperature",
    top_p: "Top p", max_tokens: "Max tokens", seed: "Seed", token: "Bearer token", system: "System text", open: "auto",
    padded: "Boxes count from the image padded to a square", hint: "Ask about an image", attach: "Add images",
    keys: "Enter sends · Shift+Enter new line · Esc stops", stop: "Stop", send: "Send", copy: "Copy",
    copied: "Copied", again: "Regenerate", edit: "Edit", remove: "Remove", title: "What do you see?",
    start: "Drop, paste or add images, and ask about them.", describe: "Describe this image in detail.",
    read: "Read the text in this image.", find: "Where is each object? Give its box.", enlarge: "Show large",
    stopped: "stopped", tokens: "tokens", you: "Image only",
    needs_token: "This server asks for a bearer token: enter it under Parameters.", no_image: "is not an image",
    not_kept: "The browser does not keep the history" },
  zh: { new: "新对话", history: "历史", model: "模型", second: "第二个模型", none: "单个模型", beside: "对比",
    language: "English", theme: "浅色或深色", parameters: "参数", temperature: "温度", top_p: "Top p",
    max_tokens: "最大词元数", seed: "随机种子", token: "访问令牌", system: "系统提示", open: "自动",
    padded: "框坐标以补成正方形后的图片为准", hint: "就图片提问", attach: "添加图片",
    keys: "Enter 发送 · Shift+Enter 换行 · Esc 停止", stop: "停止", send: "发送", copy: "复制", copied: "已复制",
    again: "重新生成", edit: "编辑", remove: "删除", title: "图中有什么？", start: "拖入、粘贴或添加图片，然后提问。",
    describe: "请详细描述这张图片。", read: "请读出图片中的文字。", find: "每个物体在哪里？请给出坐标框。", enlarge: "放大",
    stopped: "已停止", tokens: "词元", you: "仅图片", needs_token: "服务器需要访问令牌：请在参数中填写。",
    no_image: "不是图片", not_kept: "浏览器未能保存历史" },
};

const known = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let language = known in WORDS ? known : "en";

export const word = (name) => WORDS[language][name];

export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  localStorage.setItem("language", language);
  showWords();
}

export function showWords() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  for (const node of document.querySelectorAll("[data-hint]")) {
    node.placeholder = word(node.dataset.hint);
    if (node.tagName === "TEXTAREA") node.setAttribute("aria-label", node.placeholder);
  }
  for (const node of document.querySelectorAll("[data-name]")) node.setAttribute("aria-label", word(node.dataset.name));
  for (const node of document.querySelectorAll("[data-label]")) {
    node.title = word(node.dataset.label);
    node.setAttribute("aria-label", node.title);
  }
  const other = document.getElementById("language");
  other.lang = language === "en" ? "zh-CN" : "en";
  // Chinese is drawn there: who looks for it may have no font that has it.
  other.querySelector("svg").toggleAttribute("hidden", language === "zh");
  other.querySelector("span").className = language === "en" ? "unseen" : "";
}
