// The page: conversations in this browser, answers from /v1/chat/completions. No build step, no other server.
import { marked } from "/page/marked.js";

const $ = (id) => document.getElementById(id);
const STORE = "rwkv_npu conversations";

let chats = load();
let current = chats[0] ?? fresh();
let running = null; // the AbortController of the answer that is being written

function load() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? [];
  } catch {
    return [];
  }
}

function save() {
  const kept = chats.filter((chat) => chat.turns.length);
  localStorage.setItem(STORE, JSON.stringify(kept.slice(0, 100)));
}

function fresh() {
  const chat = { id: crypto.randomUUID(), title: "New conversation", system: "", preset: "", turns: [] };
  chats.unshift(chat);
  return chat;
}

// A model's text is hostile HTML: it is sanitised, and loads nothing.
const FORBIDDEN = { FORBID_TAGS: ["style", "form", "input", "img", "video", "audio"], FORBID_ATTR: ["style"] };

function html(markdown) {
  return DOMPurify.sanitize(marked.parse(markdown), FORBIDDEN);
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, action, name) {
  const made = element("button", name, text);
  made.type = "button";
  made.onclick = action;
  return made;
}

function showList() {
  $("list").replaceChildren(
    ...chats.map((chat) => {
      const item = element("li");
      const open = button(chat.title, () => choose(chat), "open");
      if (chat === current) open.setAttribute("aria-current", "true");
      const drop = button("×", () => remove(chat), "drop");
      drop.setAttribute("aria-label", `Delete ${chat.title}`);
      item.append(open, drop);
      return item;
    }),
  );
}

function show() {
  $("title").textContent = current.title;
  $("system").value = current.system;
  if (current.preset) $("preset").value = current.preset;
  $("turns").replaceChildren(...current.turns.map(showTurn));
  showList();
  $("turns").scrollTop = $("turns").scrollHeight;
}

function showTurn(turn, index) {
  const item = element("li");
  const body = element("div", turn.role);
  item.append(body);
  if (turn.role === "user") {
    body.textContent = turn.content;
  } else {
    fill(body, turn);
    const last = index === current.turns.length - 1;
    if (last && !running) {
      const facts = element("div", "facts");
      facts.append(button("Retry", retry), element("span", "", turn.facts ?? ""));
      item.append(facts);
    }
  }
  return item;
}

function fill(body, turn) {
  const open = body.querySelector("details")?.open ?? false;
  body.replaceChildren();
  if (turn.thought) {
    const thought = element("details", "", undefined);
    thought.open = open;
    thought.append(element("summary", "", "Thought"), document.createTextNode(turn.thought.trim()));
    body.append(thought);
  }
  const content = element("div");
  content.innerHTML = html(turn.content);
  body.append(content);
  if (turn.error) body.append(element("p", "error", turn.error));
}

function choose(chat) {
  running?.abort();
  current = chat;
  document.body.classList.remove("menu");
  show();
}

function remove(chat) {
  chats = chats.filter((one) => one !== chat);
  if (chat === current) current = chats[0] ?? fresh();
  save();
  show();
}

function headers() {
  const key = $("key").value || localStorage.getItem("rwkv_npu key") || "";
  const session = { "Content-Type": "application/json", "X-Session-ID": current.id };
  return key ? { ...session, Authorization: `Bearer ${key}` } : session;
}

async function send(text) {
  current.turns.push({ role: "user", content: text });
  if (current.turns.length === 1) current.title = text.slice(0, 60);
  await answer();
}

async function retry() {
  current.turns.pop();
  await answer();
}

async function answer() {
  const chat = current;
  const turn = { role: "assistant", content: "", thought: "" };
  const messages = chat.turns.map(({ role, content }) => ({ role, content }));
  if (chat.system.trim()) messages.unshift({ role: "system", content: chat.system });
  chat.turns.push(turn);
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  show();
  const body = $("turns").lastElementChild.firstElementChild;
  const began = performance.now();
  let first = 0;
  let usage = null;
  let pending = false;
  const draw = () => {
    pending = false;
    const list = $("turns");
    const following = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    fill(body, turn);
    if (following) list.scrollTop = list.scrollHeight;
  };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        model: chat.preset || undefined, messages, stream: true, stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const delta = event.choices[0]?.delta ?? {};
      turn.content += delta.content ?? "";
      turn.thought += delta.reasoning_content ?? "";
      if ((delta.content || delta.reasoning_content) && !first) first = performance.now();
      if (!pending) requestAnimationFrame(draw);
      pending = true;
    }
  } catch (error) {
    if (error.name !== "AbortError") turn.error = error.message;
  }
  turn.facts = facts(usage, began, first);
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  save();
  if (chat === current) show();
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (part.startsWith("data: ") && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function facts(usage, began, first) {
  if (!usage || !first) return "";
  const seconds = (performance.now() - first) / 1000;
  const rate = usage.completion_tokens > 1 ? `${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  const cached = usage.prompt_tokens_details.cached_tokens;
  const wait = `first word after ${((first - began) / 1000).toFixed(2)} s`;
  return [rate, wait, `${usage.prompt_tokens} read, ${cached} of them cached`].filter(Boolean).join(" · ");
}

async function status() {
  try {
    const props = await (await fetch("/props", { headers: headers() })).json();
    const metrics = await (await fetch("/metrics", { headers: headers() })).text();
    const value = (name) => Number(metrics.match(new RegExp(`^${name} (.*)$`, "m"))?.[1] ?? 0);
    const busy = value("llamacpp:requests_processing");
    const waiting = value("llamacpp:requests_deferred");
    $("model").textContent = props.model_alias;
    $("status").textContent =
      `${busy} of ${props.total_slots} slots, ${waiting} waiting · ${props.backend} · ${props.precision} weights`;
  } catch {
    $("status").textContent = "the server does not answer";
  }
}

async function fillPresets() {
  const { data } = await (await fetch("/v1/models", { headers: headers() })).json();
  $("preset").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  if (current.preset) $("preset").value = current.preset;
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  $("input").style.height = "";
  send(text);
};
$("input").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
};
$("input").oninput = () => {
  $("input").style.height = "";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
};
$("stop").onclick = () => running?.abort();
$("new").onclick = () => choose(current.turns.length ? fresh() : current);
$("menu").onclick = () => document.body.classList.toggle("menu");
$("system").onchange = () => { current.system = $("system").value; save(); };
$("preset").onchange = () => { current.preset = $("preset").value; save(); };
$("key").onchange = () => { localStorage.setItem("rwkv_npu key", $("key").value); fillPresets(); };

show();
fillPresets().catch(() => {});
status();
setInterval(() => { if (!document.hidden) status(); }, 2000);
