"use strict";
// The page asks the API every two seconds while it is visible, and shows what it is told. All text goes in as text,
// never as HTML: names are chosen by users.

const every = 2000;
const maxRows = 500;
const $ = (id) => document.getElementById(id);
let token = sessionStorage.getItem("token") || "";
let state = null;

function el(name, text, cls) {
  const e = document.createElement(name);
  if (text !== undefined && text !== null) e.textContent = String(text);
  if (cls) e.className = cls;
  return e;
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
  return (i && n < 100 ? n.toFixed(1) : Math.round(n)) + " " + units[i];
}

function ago(time) {
  const s = Math.max(0, (Date.now() - new Date(time)) / 1000);
  if (s < 90) return Math.round(s) + " s";
  if (s < 5400) return Math.round(s / 60) + " min";
  if (s < 129600) return Math.round(s / 3600) + " h";
  return Math.round(s / 86400) + " d";
}

async function get(path) {
  const headers = token ? { Authorization: "Bearer " + token } : {};
  const r = await fetch("/api/v1" + path, { headers, cache: "no-store" });
  const body = await r.json();
  if (!r.ok) throw Object.assign(new Error(body.message), { status: r.status });
  return body;
}

function bar(used, total) {
  const td = el("td");
  const p = document.createElement("progress");
  p.max = total || 1;
  p.value = used;
  td.append(p, " " + (total ? Math.round((100 * used) / total) : 0) + " %");
  return td;
}

function badge(text, cls) {
  const td = el("td");
  td.append(el("span", text, "badge " + cls));
  return td;
}

const num = (v) => el("td", v, "n");
const txt = (v) => el("td", v);

function table(id, heads, rows, none) {
  const t = $(id);
  t.replaceChildren();
  if (!rows.length) {
    t.append(el("tbody"));
    t.tBodies[0].insertRow().append(el("td", none, "none"));
    return;
  }
  const tr = t.createTHead().insertRow();
  for (const h of heads) tr.append(el("th", h.replace(/^>/, ""), h.startsWith(">") ? "n" : ""));
  const body = t.createTBody();
  for (const cells of rows.slice(0, maxRows)) body.insertRow().append(...cells);
  if (rows.length > maxRows) body.insertRow().append(el("td", "and " + (rows.length - maxRows) + " more: dog has them all", "none"));
}

const mood = { ok: "good", up: "good", degraded: "warn", full: "warn", readonly: "warn", trimming: "warn", unformatted: "warn" };

function showHead(c, n) {
  $("where").textContent = (c.formatted ? c.name + " · " : "") + "node " + n.name;
  $("status").textContent = c.status;
  $("status").className = "badge " + (mood[c.status] || "bad");
  $("reason").textContent = c.reason || n.reason || "";
  $("reason").hidden = !$("reason").textContent;
  $("version").textContent = "version " + n.version + ", up " + ago(n.started);
  const vdis = state.vdis.filter((v) => !v.snapshot);
  const facts = [
    [bytes(n.used_bytes), "used of " + bytes(n.total_bytes)],
    [vdis.length, "volumes, " + bytes(vdis.reduce((a, v) => a + v.size, 0))],
    [state.vdis.length - vdis.length, "snapshots"],
    [state.sessions.length, "sessions"],
    [n.gc.pending, "deletions to be freed"],
    [c.epoch, "epoch"],
  ];
  $("cards").replaceChildren(...facts.map(([big, small]) => {
    const d = el("div");
    d.append(el("b", big), el("span", small));
    return d;
  }));
}

function showNodes(nodes) {
  table("nodes", ["Node", "State", "Address", "Zone", ">Disks", ">Replicas", ">Primaries", "Since"],
    nodes.map((n) => [txt(n.name + (n.self ? " (this one)" : "")), badge(n.state, mood[n.state] || "bad"), txt(n.address), txt(n.zone), num(n.disks), num(n.replicas), num(n.primaries), txt(ago(n.since))]),
    "The cluster is not formatted yet: dog cluster format");
}

function showDisks(disks) {
  table("disks", ["Disk", "State", "Used", ">Size", ">Free", ">Objects", ">Log", "Scrub", ">Corrupt"],
    disks.map((d) => [txt(d.path), badge(d.state, mood[d.state] || "bad"), bar(d.used_bytes, d.total_bytes), num(bytes(d.total_bytes)), num(bytes(d.free_bytes)), num(d.objects), num(bytes(d.log_bytes)),
      txt(d.scrub.running ? Math.floor(100 * d.scrub.done) + " %" : d.scrub.last_end ? ago(d.scrub.last_end) + " ago" : "–"), el("td", d.corrupt.length, d.corrupt.length ? "n bad" : "n")]),
    "This node has no disks: it is a gateway");
}

function showVolumes() {
  const want = $("filter").value.toLowerCase();
  const rows = state.vdis.filter((v) => v.name.toLowerCase().includes(want)).map((v) => [
    v.snapshot ? el("td", "@" + (v.tag || v.snapshot_id), "snap") : txt(v.name),
    num(bytes(v.size)), num(v.known ? bytes(v.used) : "…"), num(v.known ? bytes(v.shared) : "…"), num(v.copies),
    txt(v.owner || "–"), txt(v.lock ? v.lock.holder : "–"), txt((v.openers || []).join(", ") || "–"), txt(ago(v.snapped || v.created) + " ago"),
  ]);
  table("volumes", ["Volume", ">Size", ">Used", ">Shared", ">Copies", "Owner", "Locked by", "Open by", "Created"], rows, want ? "Nothing has that name" : "None yet: dog vdi create NAME SIZE");
}

function showSessions(list) {
  table("sessions", ["Client", "Protocol", "Volume", ">Reads", ">Writes", ">Read", ">Written", ">In flight", "Since"],
    list.map((s) => [txt(s.peer), txt(s.protocol + (s.tls ? " (TLS)" : "")), txt(s.export + (s.read_only ? " (read-only)" : "")), num(s.reads), num(s.writes), num(bytes(s.read_bytes)), num(bytes(s.written_bytes)), num(s.in_flight), txt(ago(s.started))]),
    "Nobody is connected");
}

async function refresh() {
  try {
    const [cluster, node, nodes, vdis, sessions] = await Promise.all(["/cluster", "/node", "/nodes", "/vdis", "/sessions"].map(get));
    state = { vdis, sessions };
    showHead(cluster, node);
    showNodes(nodes);
    showDisks(node.disks);
    showVolumes();
    showSessions(sessions);
    $("login").hidden = true;
    $("live").textContent = "live";
    $("live").className = "";
  } catch (e) {
    $("login").hidden = e.status !== 401;
    $("live").textContent = e.status ? e.message : "no answer from the node";
    $("live").className = "off";
  }
}

async function loop() {
  if (!document.hidden) await refresh();
  setTimeout(loop, every);
}

$("login").addEventListener("submit", (e) => {
  e.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("token", token);
  refresh();
});
$("filter").addEventListener("input", () => state && showVolumes());
document.addEventListener("visibilitychange", refresh);
loop();
