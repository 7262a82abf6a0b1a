// Runs the report's script on a page of plain objects: node fake_page.js SCRIPT < {"data": text, "steps": [...]}
// steps: ["change", label, option], ["input", label, text], ["tick", label], ["key", tag, key], ["click", text],
// ["list", option]. Prints what the page then is: its tags, attributes, texts, and what was said after each step.
"use strict";
const fs = require("fs");

class Text {
  constructor(text) { this.textContent = text; }
}

class Element {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, children: [], listeners: {}, style: {}, clientWidth: 800 });
  }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  append(...nodes) { this.children.push(...nodes.map((node) => (typeof node === "string" ? new Text(node) : node))); }
  replaceChildren(...nodes) { this.children = []; this.append(...nodes); }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  fire(name, event = {}) { this.listeners[name]({ preventDefault() {}, ...event }); }
  focus() {}
  getBoundingClientRect() { return { left: 0, width: 720 }; }
  getContext() {
    const draw = (name) => (name === "measureText" ? () => ({ width: 9 }) : () => {});
    return new Proxy({}, { get: (_, name) => draw(name), set: () => true });
  }
  get textContent() { return this.children.map((child) => child.textContent).join(""); }
  set textContent(text) { this.children = [new Text(String(text))]; }
  set innerHTML(_) { throw new Error("markup is made of data"); }
  all() { return [this, ...this.children.filter((child) => child instanceof Element).flatMap((child) => child.all())]; }
}

const { data, steps } = JSON.parse(fs.readFileSync(0, "utf8"));
const root = new Element("div"), holder = new Element("script");
holder.textContent = data;
globalThis.document = {
  createElement: (tag) => new Element(tag),
  createElementNS: (_, tag) => new Element(tag),
  getElementById: (id) => ({ explore: root, "explore-data": holder })[id],
};
globalThis.window = {
  getComputedStyle: () => ({ getPropertyValue: () => " #000" }), addEventListener() {},
  matchMedia: () => ({ addEventListener() {} }),
};
require(fs.realpathSync(process.argv[2]));

const labelled = (text) => root.all().find((e) => e.tag === "label" && e.textContent.startsWith(text))
  .all().find((e) => e.tag === "select" || e.tag === "input");
const ticked = (text) => root.all().find((e) => e.attributes.class === "tick" && e.textContent === text).children[0];
const act = {
  change: (label, option) => { const e = labelled(label); e.selectedIndex = option; e.fire("change"); },
  input: (label, text) => { const e = labelled(label); e.value = text; e.fire("input"); },
  tick: (label) => { const e = ticked(label); e.checked = !e.checked; e.fire("change"); },
  key: (tag, key) => root.all().find((e) => e.tag === tag && e.listeners.keydown).fire("keydown", { key }),
  click: (text) => root.all().find((e) => e.tag === "button" && e.textContent === text).fire("click"),
  list: (option) => {
    const e = root.all().find((found) => found.attributes.class === "list");
    e.selectedIndex = option;
    e.fire("change");
  },
};
const texts = (of) => root.all().filter((e) => of.includes(e.attributes.class) || of.includes(e.tag))
  .map((e) => e.textContent);
const look = () => ({
  told: texts(["told"]), soft: texts(["soft"]), notes: texts(["note"]), titles: texts(["h3", "h4"]),
  rows: root.all().filter((e) => e.tag === "tr").map((row) => row.children.map((cell) => cell.textContent)),
});
const said = [look(), ...steps.map(([name, ...rest]) => { act[name](...rest); return look(); })];
const attributes = root.all().flatMap((e) => Object.entries(e.attributes));
const tags = [...new Set(root.all().map((e) => e.tag))];
console.log(JSON.stringify({ said, tags, attributes, text: root.textContent }));
