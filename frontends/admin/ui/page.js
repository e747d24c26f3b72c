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

function bar(used, total, text) {
  const td = el("td");
  const p = document.createElement("progress");
  p.max = total || 1;
  p.value = used;
  td.append(p, " " + (text || (total ? Math.round((100 * used) / total) : 0) + " %"));
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
    [c.nodes_up + c.nodes_down ? c.nodes_up + " of " + (c.nodes_up + c.nodes_down) : "–", "nodes up"],
    [c.epoch, "epoch"],
  ];
  $("cards").replaceChildren(...facts.map(([big, small]) => {
    const d = el("div");
    d.append(el("b", big), el("span", small));
    return d;
  }));
}

function nodeState(n) {
  if (n.drain) return n.state + (n.replicas ? ", draining" : ", drained");
  return n.state + (n.out ? ", out" : "");
}

function showNodes(nodes) {
  table("nodes", ["Node", "State", "Address", "Zone", ">Disks", ">Weight", ">Replicas", ">Primaries", "Since"],
    nodes.map((n) => [txt(n.name + (n.self ? " (this one)" : "") + (n.leader ? ", leads" : "")), badge(nodeState(n), mood[nodeState(n)] || (n.state === "up" ? "warn" : "bad")), txt(n.address), txt(n.zone),
      num(n.gateway ? "gateway" : n.disks), num(n.weight + (n.percent === 100 ? "" : " × " + n.percent + " %")), bar(n.replicas - n.learning, n.targets, n.replicas + " of " + n.targets), num(n.primaries), txt(ago(n.since))]),
    "The cluster is not formatted yet: dog cluster format");
}

function showRecovery(r) {
  const when = r.out_after < 0 ? "nodes that are down are waited for without end" : "nodes that are down are waited for " + Math.round(r.out_after / 60) + " min";
  $("recovery").textContent = (r.enabled ? "Enabled; " : "Disabled: data stays where it is; ") + when + ". " +
    (r.moving ? r.moving + " of " + r.partitions + " partitions are to be moved." : "All data is where it shall be.");
  $("recovery").className = r.enabled && !r.moving ? "" : "warn";
  table("moving", ["Node", "State", ">Learning", ">Missing", ">Leaving"],
    r.nodes.map((n) => [txt(n.node), txt(n.state + (n.why ? ", " + n.why : "")), num(n.learning), num(n.missing), num(n.leaving)]), "Nothing is to be moved");
}

function showPartitions(policies) {
  table("partitions", ["Policy", ">Copies", ">Written to at least", ">Partitions", "Whole", ">Degraded", ">Unavailable", ">Recovering"],
    policies.map((p) => [txt(p.id), num(p.copies), num(p.min_in_sync), num(p.partitions), bar(p.partitions - p.degraded, p.partitions), el("td", p.degraded, p.degraded ? "n warn" : "n"), el("td", p.unavailable, p.unavailable ? "n bad" : "n"), num(p.recovering)]),
    "There are none yet");
}

function showDisks(disks) {
  table("disks", ["Node", "Disk", "State", "Used", ">Size", ">Free", ">Objects", ">Partitions", ">Log", "Scrub", ">Corrupt"],
    disks.map((d) => [txt(d.node), txt(d.path), badge(d.state, mood[d.state] || "bad"), bar(d.used_bytes, d.total_bytes), num(bytes(d.total_bytes)), num(bytes(d.free_bytes)), num(d.objects), num(d.partitions + (d.moves.to_come ? ", " + d.moves.to_come + " to come" : "") + (d.moves.to_go ? ", " + d.moves.to_go + " to go" : "")), num(bytes(d.log_bytes)),
      txt(d.scrub.running ? Math.floor(100 * d.scrub.done) + " %" : d.scrub.last_end ? ago(d.scrub.last_end) + " ago" : "–"), el("td", d.corrupt.length, d.corrupt.length ? "n bad" : "n")]),
    "There are none: all nodes are gateways");
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
    const [cluster, node, nodes, vdis, sessions, disks, recovery] = await Promise.all(["/cluster", "/node", "/nodes", "/vdis", "/sessions", "/disks", "/recovery"].map(get));
    state = { vdis, sessions };
    showHead(cluster, node);
    showNodes(nodes);
    showRecovery(recovery);
    showPartitions(cluster.policies);
    showDisks(disks);
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
