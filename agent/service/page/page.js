// The page: asks for a document, shows it as it is written, and keeps a list of those asked for in this browser.
const $ = (id) => document.getElementById(id);
const PAST = "llmi.past", KEY = "llmi.key", MOST = 100;

// What goes on after each stage of test-time scaling.
const stages = {
  candidates: "Checking the answers", checks: "Choosing the best", selection: "Trying other pictures",
  enhancement: "Polishing the text", polishing: "Finishing",
};

let chosen = [];      // the user's pictures as data URLs
let current = null;   // the document that is shown, as the service tells of it
let asked = null;     // what was asked for it
let running = null;   // AbortController of the one being written

const headers = () => {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function problem(response) {
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) { $("key-row").hidden = false; $("key").focus(); }
  return body.error?.message ?? `the service answered ${response.status}`;
}

// Server-sent events of a response, as [name, data].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [event, data] = block.split("\n");
      yield [event.slice(7), JSON.parse(data.slice(6))];
    }
  }
}

// Shows HTML of the service's making; what has not changed stays, so that pictures do not flicker.
function draw(html) {
  const next = new DOMParser().parseFromString(html, "text/html").querySelector("section");
  const now = $("document").querySelector("section");
  if (!now) { $("document").replaceChildren(next); return; }
  [...next.childNodes].forEach((node, i) => {
    const old = now.childNodes[i];
    if (!old) now.append(node.cloneNode(true));
    else if (!old.isEqualNode(node)) old.replaceWith(node.cloneNode(true));
  });
  while (now.childNodes.length > next.childNodes.length) now.lastChild.remove();
}

async function write(body) {
  running?.abort();
  const mine = running = new AbortController();
  asked = body; current = null;
  $("document").replaceChildren();
  busy(true);
  say("Writing ...");
  let open = 0, told = "";
  try {
    const response = await fetch("/v1/documents", {
      method: "POST", headers: headers(), signal: mine.signal, body: JSON.stringify({ ...body, stream: true, html: true }),
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const [name, data] of events(response)) {
      if (name === "begun") { current = { id: data.id }; remember(data.id, body.prompt); }
      else if (name === "html") draw(data.html);
      else if (name === "call") { open += 1; say(`${data.source}: ${data.description} ...`); }
      else if (name === "stage") say(`${stages[data.name] ?? data.name} ...`);
      else if (name === "made") { open -= 1; if (!open) say("Writing ..."); }
      else if (name === "done") { show(data); told = "done"; }
      else if (name === "failed") { told = data.status; throw new Error(data.reason); }
    }
    if (!told) throw new Error("the service broke off");
    say("Done.");
  } catch (error) {
    if (mine !== running) return;
    say(mine.signal.aborted ? "Stopped." : `It failed: ${error.message}.`, !mine.signal.aborted);
    $("actions").hidden = false;
  } finally {
    if (mine === running) { running = null; busy(false); }
  }
}

function busy(is) {
  $("document").setAttribute("aria-busy", is);
  $("stop").hidden = !is;
  $("write").disabled = is;
  if (is) { $("actions").hidden = true; $("calls").hidden = true; }
}

function show(row) {
  current = row;
  draw(row.html);
  calls(row.calls, row.scaling);
  $("actions").hidden = false;
  for (const thumb of ["up", "down"]) $(thumb).setAttribute("aria-pressed", row.feedback?.thumb === thumb);
}

function calls(list, scaling) {
  const cost = list.reduce((sum, call) => sum + call.seconds, 0);
  const head = document.createElement("p");
  head.className = "quiet";
  head.textContent = list.length ? `${list.length} calls, ${cost.toFixed(1)} s of tools` : "No tool was called.";
  const spent = scaling.map((stage) => {
    const line = document.createElement("p");
    line.className = "quiet";
    line.textContent = `${stage.name}: ${stage.changed.join("; ") || "nothing better"} (${stage.tokens} tokens, `
      + `${stage.calls} calls, ${stage.seconds.toFixed(1)} s)`;
    return line;
  });
  $("calls").replaceChildren(head, ...spent, ...list.map((call) => {
    const box = document.createElement("details"), title = document.createElement("summary"), facts = document.createElement("dl");
    title.textContent = `${call.source}: ${call.description || "a tag"} (${call.status}, ${call.seconds.toFixed(1)} s)`;
    const told = { reason: call.reason, ...call.params, ...call.provenance };
    for (const [name, value] of Object.entries(told)) {
      if (value === "" || value == null) continue;
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = typeof value === "object" ? JSON.stringify(value, null, 1) : value;
      facts.append(dt, dd);
    }
    box.append(title, facts);
    return box;
  }));
}

// History.
const past = () => JSON.parse(localStorage.getItem(PAST) ?? "[]");

function remember(id, prompt) {
  localStorage.setItem(PAST, JSON.stringify([{ id, prompt }, ...past()].slice(0, MOST)));
  list();
}

function list() {
  $("no-past").hidden = past().length > 0;
  $("past").replaceChildren(...past().map(({ id, prompt }) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.addEventListener("click", () => reopen(id, prompt));
    item.append(button);
    return item;
  }));
}

async function reopen(id, prompt) {
  const response = await fetch(`/v1/documents/${id}`, { headers: headers() });
  if (!response.ok) { say(`It cannot be shown: ${await problem(response)}.`, true); return; }
  $("document").replaceChildren();
  $("prompt").value = prompt;
  asked = { prompt, images: [] };
  show(await response.json());
  say("");
  toggle("show-history", "history", false);
  $("document").focus();
}

// The user's pictures.
async function choose(files) {
  const read = (file) => new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  });
  chosen.push(...await Promise.all([...files].map(read)));
  pictures();
}

function pictures() {
  $("chosen").replaceChildren(...chosen.map((url, i) => {
    const figure = document.createElement("figure"), image = document.createElement("img"), button = document.createElement("button");
    image.src = url;
    image.alt = `Your picture ${i + 1}`;
    button.type = "button";
    button.textContent = "×";
    button.setAttribute("aria-label", `Remove picture ${i + 1}`);
    button.addEventListener("click", () => { chosen.splice(i, 1); pictures(); $("prompt").focus(); });
    figure.append(image, button);
    return figure;
  }));
}

// Files.
function save(data, type, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function rate(thumb) {
  const response = await fetch(`/v1/documents/${current.id}/feedback`, {
    method: "POST", headers: headers(), body: JSON.stringify({ thumb }),
  });
  if (!response.ok) { say(`That was not kept: ${await problem(response)}.`, true); return; }
  for (const other of ["up", "down"]) $(other).setAttribute("aria-pressed", other === thumb);
  say("Thank you.");
}

function toggle(button, part, open = $(part).hidden) {
  $(part).hidden = !open;
  $(button).setAttribute("aria-expanded", open);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("key").value) sessionStorage.setItem(KEY, $("key").value);
  write({
    prompt: $("prompt").value, images: [...chosen], scale: Number($("scale").value), learn: $("learn").checked,
  });
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("images").addEventListener("change", () => { choose($("images").files); $("images").value = ""; });
$("stop").addEventListener("click", () => running?.abort());
$("retry").addEventListener("click", () => write(asked));
$("up").addEventListener("click", () => rate("up"));
$("down").addEventListener("click", () => rate("down"));
$("show-calls").addEventListener("click", () => toggle("show-calls", "calls"));
$("show-history").addEventListener("click", () => toggle("show-history", "history"));
$("get-pdf").addEventListener("click", () => print());
$("get-md").addEventListener("click", () => {
  save(current.markdown.replaceAll("](/v1/", `](${location.origin}/v1/`), "text/markdown", "document.md");
});
$("get-html").addEventListener("click", async () => {
  const response = await fetch(`/v1/documents/${current.id}/page`, { headers: headers() });
  if (response.ok) save(await response.text(), "text/html", "document.html");
  else say(`It cannot be had: ${await problem(response)}.`, true);
});
list();
fetch("/readyz").then(async (response) => { $("learn-row").hidden = !(await response.json()).learns; }).catch(() => {});
