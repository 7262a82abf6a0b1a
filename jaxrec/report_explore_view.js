// The interactive part of report.html: draws the widgets that stand in the page as JSON (see report_explore.py).
// Texts come from models and data sets: they become text nodes or attributes that only name things, never markup.
(() => {
  const {
    show, clean, viewOf, compared, overlap, rankOf, extent, ticks, passing, sorted, matching, ranked, badges, shortened,
    scaled, bandAt,
  } = Explore;

  // --- Parts of the page ---------------------------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg"; // the name of a vocabulary; nothing is loaded

  function put(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children.map((child) => (typeof child === "string" ? clean(child) : child)));
    return node;
  }
  const el = (tag, attributes = {}, ...children) => put(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) => put(document.createElementNS(SVG, tag), attributes, children);
  const soft = (text) => el("p", { class: "soft" }, text);
  const picks = (...nodes) => el("div", { class: "picks" }, ...nodes);
  const pair = (...nodes) => el("span", { class: "pair" }, ...nodes);
  const spoken = () => el("p", { class: "told", role: "status", "aria-live": "polite" });

  /** A labelled select; `changed` is called with the number of the option. */
  function picker(label, options, chosen, changed) {
    const select = el("select", {}, ...options.map((option) => el("option", {}, option)));
    select.selectedIndex = chosen;
    select.addEventListener("change", () => changed(select.selectedIndex));
    return el("label", { class: "pick" }, label, select);
  }

  function field(label, type, changed) {
    const input = el("input", type === "number" ? { type, step: "any" } : { type });
    input.addEventListener("input", () => changed(input.value));
    return el("label", { class: "pick" }, label, input);
  }

  /** A box to tick, called with whether it is ticked; `more` stands between box and label. */
  function tick(label, ticked, changed, ...more) {
    const box = el("input", { type: "checkbox" });
    box.checked = ticked;
    box.addEventListener("change", () => changed(box.checked));
    return el("label", { class: "tick" }, box, ...more, label);
  }

  function button(text, pressed) {
    const node = el("button", { type: "button" }, text);
    node.addEventListener("click", pressed);
    return node;
  }

  /** A table with headings ("text" ones to the left), in a box that scrolls. */
  function tableOf(headings, texts, body) {
    const cells = headings.map((h) => el("th", { scope: "col", class: texts.includes(h) ? "text" : "" }, h));
    return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...cells)), body));
  }

  /** The selects of a widget with views, changing `choice`. */
  function choosers(widget, choice, changed) {
    return widget.selects.map((select, place) =>
      picker(select.name, select.options, choice[place], (option) => {
        choice[place] = option;
        changed();
      }));
  }

  /** What another choice has that a first one has not: "with domain facts". */
  function otherwise(widget, choice, other) {
    const places = widget.selects.map((_, place) => place).filter((place) => choice[place] !== other[place]);
    const names = places.map((place) => `${widget.selects[place].name} ${widget.selects[place].options[other[place]]}`);
    return `with ${names.join(", ")}`;
  }

  /** Calls `move` with the place that a key leads to. places: key -> function that gives it. */
  function onKeys(node, places, move) {
    node.addEventListener("keydown", (event) => {
      if (!Object.hasOwn(places, event.key)) return;
      event.preventDefault();
      move(places[event.key]());
    });
  }

  const within = (value, count) => Math.max(0, Math.min(count - 1, value));

  // --- Map -----------------------------------------------------------------------------------------------------

  function drawMap(widget) {
    const rows = widget.rows.labels, columns = widget.columns.labels, LEFT = 46, FOOT = 20;
    const choice = widget.selects.map(() => 0), other = widget.selects.map(() => -1);
    const canvas = el("canvas", {
      tabindex: "0", role: "application",
      "aria-label": clean(`${widget.title}: ${widget.value} by ${widget.rows.name} and ${widget.columns.name}. ` +
        "Arrow keys move from cell to cell."),
    });
    const told = spoken(), about = soft(""), legend = soft(""), scroll = el("div", { class: "scroll" }, canvas);
    let row = 0, column = 0, wide = 10, high = 10, view = null, second = null, grid = null;

    function tell() {
      const words = [`${widget.rows.name} ${rows[row]}, ${widget.columns.name} ${columns[column]}`];
      if (grid) words.push(`${widget.value} ${show(grid[row][column])}`);
      if (grid && widget.rank && grid[row][column] !== null) {
        const all = rows.length * columns.length;
        const among = widget.rank === "row" ? `${columns.length} in its ${widget.rows.name}` : all;
        words.push(`rank ${rankOf(grid, row, column, widget.rank)} of ${among}`);
      }
      const state = (marks) => (marks[row][column] === "1" ? widget.mark : `not ${widget.mark}`);
      if (view && view.marks) words.push(state(view.marks));
      if (second && second.marks) words.push(`${state(second.marks)} ${otherwise(widget, choice, second.choice)}`);
      told.textContent = clean(words.join("; "));
    }

    function explain() {
      const parts = [view ? view.text : "There is no such map."];
      if (compared(choice, other) && !second) parts.push("There is nothing of that kind to compare with.");
      const common = view && second && view.marks && second.marks ? overlap(view.marks, second.marks) : null;
      if (common) {
        const how = otherwise(widget, choice, second.choice);
        parts.push(`Of those ${widget.mark}, ${show(100 * common.mean)} % are also ${widget.mark} ${how} ` +
          `(mean over rows, which have ${show(100 * common.low)} % to ${show(100 * common.high)} %).`);
      }
      about.textContent = clean(parts.filter(Boolean).join(" "));
      const [low, most] = extent(grid || []);
      const shades = `Palest ${show(Math.min(low, 0))}, strongest ${show(most)}: ${widget.value}.`;
      const lower = second ? ` Lower bar: ${widget.mark} ${otherwise(widget, choice, second.choice)}.` : "";
      const bars = `${second ? "Upper bar" : "Bar"}: ${widget.mark}.${lower}`;
      legend.textContent = clean(`${grid ? shades : "Marks alone, without values."} ${view && view.marks ? bars : ""}`);
    }

    /** How strong the colour of a value is, from 0.05 to 1; roots let small counts be seen. */
    function shade(value, low, most) {
      const share = (value - low) / (most - low || 1);
      return 0.05 + 0.95 * (widget.shade === "root" ? Math.sqrt(share) : share);
    }

    function draw() {
      const style = window.getComputedStyle(canvas), colour = (name) => style.getPropertyValue(name).trim();
      wide = Math.max(4, Math.min(46, ((scroll.clientWidth || 800) - LEFT - 2) / columns.length));
      high = rows.length > 12 ? 15 : 26;
      const width = LEFT + wide * columns.length + 2, height = high * rows.length + FOOT;
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      pen.font = "11px system-ui, sans-serif";
      pen.textBaseline = "middle";
      const [low, most] = extent(grid || []), gap = wide > 8 ? 1 : 0, bar = Math.max(3, Math.round(high / 6));
      const accent = colour("--accent"), warm = colour("--warm"), ink = colour("--soft");
      rows.forEach((label, r) => {
        columns.forEach((_, c) => {
          const x = LEFT + wide * c, value = grid ? grid[r][c] : null;
          pen.globalAlpha = value === null ? 0.05 : shade(value, Math.min(low, 0), most);
          pen.fillStyle = accent;
          pen.fillRect(x, high * r, wide - gap, high - 1);
          pen.globalAlpha = 1;
          pen.fillStyle = warm;
          const foot = high * (r + 1) - 2;
          const tracks = second ? [[view, foot - 2 * bar - 1], [second, foot - bar]] : [[view, foot - bar]];
          for (const [v, y] of tracks) {
            if (v && v.marks && v.marks[r][c] === "1") pen.fillRect(x, y, wide - gap, bar);
          }
        });
        pen.fillStyle = ink;
        pen.textAlign = "right";
        pen.fillText(clean(label).slice(0, 6), LEFT - 6, high * (r + 0.5));
      });
      pen.textAlign = "left";
      let free = 0;
      columns.forEach((label, c) => {
        const x = LEFT + wide * c;
        if (x < free) return;
        pen.fillText(clean(label), x, high * rows.length + FOOT / 2);
        free = x + pen.measureText(clean(label)).width + 10;
      });
      pen.strokeStyle = colour("--ink");
      pen.lineWidth = 2;
      pen.strokeRect(LEFT + wide * column, high * row + 1, Math.max(wide - gap, 3), high - 2);
    }

    function update() {
      const at = compared(choice, other);
      view = viewOf(widget.views, choice);
      second = at && viewOf(widget.views, at);
      grid = view && view.grid !== null ? widget.grids[view.grid] : null;
      explain();
      tell();
      draw();
    }

    function go([r, c]) {
      const next = [within(r, rows.length), within(c, columns.length)];
      if (next[0] === row && next[1] === column) return;
      [row, column] = next;
      const x = LEFT + wide * column, seen = scroll.scrollLeft;
      if (x < seen || x + wide > seen + scroll.clientWidth) scroll.scrollLeft = x - scroll.clientWidth / 2;
      tell();
      draw();
    }
    canvas.addEventListener("pointermove", (event) =>
      go([Math.floor(event.offsetY / high), Math.floor((event.offsetX - LEFT) / wide)]));
    onKeys(canvas, {
      ArrowLeft: () => [row, column - 1], ArrowRight: () => [row, column + 1], ArrowUp: () => [row - 1, column],
      ArrowDown: () => [row + 1, column], Home: () => [row, 0], End: () => [row, columns.length - 1],
    }, go);
    const comparing = widget.compare.map((name) => {
      const place = widget.selects.findIndex((select) => select.name === name);
      return picker(`compare: ${name}`, ["the same", ...widget.selects[place].options], 0, (option) => {
        other[place] = option - 1;
        update();
      });
    });
    window.addEventListener("resize", draw);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    const nodes = [picks(...choosers(widget, choice, update), ...comparing), about, scroll, told, legend];
    return { nodes, start: update };
  }

  // --- Curves --------------------------------------------------------------------------------------------------

  function drawCurves(widget) {
    const W = 720, H = 260, LEFT = 56, RIGHT = 12, TOP = 26, FOOT = 34, count = widget.at.length;
    const choice = widget.selects.map(() => 0), hidden = new Set();
    let divided = widget.normalise, at = 0, view = null;
    const plot = svg("svg", {
      viewBox: `0 0 ${W} ${H}`, tabindex: "0", role: "application", class: "plot",
      "aria-label": clean(`${widget.title} by ${widget.x}. Left and right arrow keys read the values.`),
    });
    const told = spoken(), keys = picks(), scroll = el("div", { class: "scroll" }, plot);
    const across = (place) => LEFT + ((W - LEFT - RIGHT) * (place + 0.5)) / count;
    const valuesOf = (series) => (divided ? scaled(series.values) : series.values);

    function tell(shown) {
      const band = bandAt(view.bands, at), values = shown.map((s) => `${s.name} ${show(s.values[at])}`);
      const where = `${widget.x} ${show(widget.at[at])}${band ? ` (${band})` : ""}`;
      told.textContent = clean(`${where}: ${values.join(", ") || "no curve is ticked"}`);
    }

    function behind(low, high, down) {
      const line = (x1, x2, y1, y2, kind) => svg("line", { x1, x2, y1, y2, class: kind });
      const text = (x, y, kind, words) => svg("text", { x, y, class: `axis ${kind}` }, words);
      const bands = view.bands.flatMap((band, number) => {
        const x = across(band.start - 0.5), width = across(band.end - 0.5) - x;
        const box = { x, y: TOP, width, height: H - FOOT - TOP, class: `band b${number % 2}` };
        return [svg("rect", box), text(x + 4, TOP - 8, "", band.name)];
      });
      const rules = ticks(low, high, 5).flatMap((value) =>
        [line(LEFT, W - RIGHT, down(value), down(value), "rule"), text(LEFT - 6, down(value) + 4, "end", show(value))]);
      const places = ticks(0, count - 1, 10).filter(Number.isInteger).map((place) =>
        text(across(place), H - FOOT + 15, "middle", show(widget.at[place])));
      const here = line(across(at), across(at), TOP, H - FOOT, "here");
      return [...bands, ...rules, ...places, text((LEFT + W - RIGHT) / 2, H - 4, "middle", widget.x), here];
    }

    function draw() {
      if (!view) {
        plot.replaceChildren();
        told.textContent = "There are no such curves.";
        return;
      }
      const numbered = view.series.map((s, number) => ({ name: s.name, number, values: valuesOf(s) }));
      const shown = numbered.filter((s) => !hidden.has(s.name));
      const [least, most] = extent(shown.map((s) => s.values));
      const low = Math.min(least, 0), high = most > low ? most : low + 1;
      const down = (value) => H - FOOT - ((H - FOOT - TOP) * (value - low)) / (high - low);
      const lines = shown.flatMap((s) => {
        const points = s.values.map((value, place) => [place, value]).filter(([, value]) => value !== null)
          .map(([place, value]) => `${across(place).toFixed(1)},${down(value).toFixed(1)}`);
        const line = svg("polyline", { points: points.join(" "), class: `curve c${s.number % 8}` });
        if (s.values[at] === null) return [line];
        return [line, svg("circle", { cx: across(at), cy: down(s.values[at]), r: 4, class: `dot c${s.number % 8}` })];
      });
      plot.replaceChildren(...behind(low, high, down), ...lines);
      tell(shown);
    }

    function go(place) {
      if (within(place, count) === at) return;
      at = within(place, count);
      draw();
    }

    function update() {
      view = viewOf(widget.views, choice);
      keys.replaceChildren(...(view ? view.series : []).map((s, number) => {
        const line = svg("polyline", { points: "1,4 25,4", class: `curve c${number % 8}` });
        const sample = svg("svg", { viewBox: "0 0 26 8", class: "sample", "aria-hidden": "true" }, line);
        return tick(s.name, !hidden.has(s.name), (ticked) => {
          if (ticked) hidden.delete(s.name);
          else hidden.add(s.name);
          draw();
        }, sample);
      }));
      draw();
    }
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect(), x = ((event.clientX - box.left) * W) / box.width;
      go(Math.floor(((x - LEFT) * count) / (W - LEFT - RIGHT)));
    });
    onKeys(plot, { ArrowLeft: () => at - 1, ArrowRight: () => at + 1, Home: () => 0, End: () => count - 1 }, go);
    const scale = tick("each divided by its largest value", divided, (ticked) => {
      divided = ticked;
      draw();
    });
    return { nodes: [picks(...choosers(widget, choice, update), scale), keys, scroll, told], start: update };
  }

  // --- Table ---------------------------------------------------------------------------------------------------

  function drawTable(widget) {
    const SIZE = 20, columns = widget.columns, tests = columns.map(() => null);
    const total = columns.length ? columns[0].values.length : 0;
    const head = el("tr"), body = el("tbody"), told = spoken();
    let by = -1, descending = false, page = 0;

    function turn(to) {
      page = to;
      draw();
    }
    const back = button("Previous", () => turn(page - 1)), on = button("Next", () => turn(page + 1));

    function filterOf(column, place) {
      if (column.filter === "choice") {
        const options = [...new Set(column.values)];
        return [picker(column.name, ["all", ...options], 0, (number) => {
          tests[place] = number ? { option: options[number - 1] } : null;
          turn(0);
        })];
      }
      if (column.filter !== "range") return [];
      const test = (tests[place] = { low: null, high: null });
      const bound = (end) => (text) => {
        test[end] = text === "" || !Number.isFinite(Number(text)) ? null : Number(text);
        turn(0);
      };
      return [pair(field(`${column.name} from`, "number", bound("low")), field("to", "number", bound("high")))];
    }

    function sortBy(place) {
      descending = place === by && !descending;
      by = place;
      turn(0);
      head.children[place].children[0].focus(); // the heading that was pressed has been made anew
    }

    function heading(column, place) {
      const state = place !== by ? "none" : descending ? "descending" : "ascending";
      const sign = { none: "", ascending: " ▲", descending: " ▼" }[state];
      return el("th", { scope: "col", "aria-sort": state }, button(column.name + sign, () => sortBy(place)));
    }

    function draw() {
      const found = passing(columns, tests);
      const rows = by < 0 ? found : sorted(found, columns[by].values, descending);
      page = within(page, Math.ceil(rows.length / SIZE) || 1);
      const part = rows.slice(page * SIZE, (page + 1) * SIZE);
      head.replaceChildren(...columns.map(heading));
      body.replaceChildren(...part.map((row) =>
        el("tr", {}, ...columns.map((column) => el("td", {}, show(column.values[row]))))));
      const first = page * SIZE + 1, last = page * SIZE + part.length;
      const which = part.length ? `Rows ${show(first)} to ${show(last)} of ${show(rows.length)}` : "No row of those";
      told.textContent = `${which} that the filters let through; ${show(total)} in all.`;
      back.disabled = page === 0;
      on.disabled = last >= rows.length;
    }
    const table = el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), body));
    return { nodes: [picks(...columns.flatMap(filterOf)), told, table, picks(back, on)], start: draw };
  }

  // --- Ranking -------------------------------------------------------------------------------------------------

  function drawRanking(widget) {
    const MOST = 10, wanted = widget.filters.map((outcome) => [outcome, null]);
    const list = el("select", { size: "8", class: "list", "aria-label": clean(`Every ${widget.record} found`) });
    const told = spoken(), title = el("h4"), facts = soft(""), rest = soft("");
    const items = el("tbody"), outcomes = el("tbody");
    let text = "", score = 0, all = false, found = [], chosen = 0;

    function search() {
      found = matching(widget.records, text, wanted);
      const lines = found.map((number) => el("option", {}, `${number + 1}. ${widget.records[number].title}`));
      list.replaceChildren(...lines);
      const total = show(widget.records.length);
      told.textContent = clean(`Found: ${show(found.length)} of ${total}. Choose a ${widget.record}:`);
      if (!found.includes(chosen)) chosen = found.length ? found[0] : -1;
      list.selectedIndex = found.indexOf(chosen);
      draw();
    }

    function itemRow(record, place, rank, most) {
      const number = record.numbers[place], value = record.scores[score][place], bar = el("span", { class: "bar" });
      bar.style.width = `${((100 * Math.max(0, value || 0)) / most).toFixed(1)}%`;
      const signs = badges(record, widget.marks, number).map((sign) => el("span", { class: "badge none" }, sign));
      return el("tr", record.marks[0].includes(number) ? { class: "first" } : {},
        el("td", {}, show(rank + 1)), el("td", {}, show(number)), el("td", { class: "score" }, show(value), bar),
        el("td", { class: "text" }, ...signs), el("td", { class: "text" }, record.labels[place]),
        el("td", { class: "text long" }, record.texts[place]));
    }

    function draw() {
      const record = widget.records[chosen];
      if (!record) {
        title.textContent = `No ${clean(widget.record)} fits.`;
        for (const node of [facts, items, outcomes, rest]) node.replaceChildren();
        return;
      }
      title.textContent = clean(record.title);
      facts.textContent = clean(record.facts.map(([name, value]) => `${name}: ${value}`).join(" · "));
      outcomes.replaceChildren(...widget.outcomes.map((name, place) => {
        const [good, said] = record.outcomes[place];
        const badge = el("span", { class: good ? "badge yes" : "badge no" }, good ? "right" : "wrong");
        return el("tr", {}, el("td", {}, name), el("td", {}, badge), el("td", { class: "text long" }, said));
      }));
      const order = ranked(record, score), most = Math.max(extent([record.scores[score]])[1], 1e-30);
      const shown = shortened(record, widget.marks, order, MOST, all);
      items.replaceChildren(...shown.map((place) => itemRow(record, place, order.indexOf(place), most)));
      const folded = order.length - shown.length;
      rest.textContent = (folded ? `${show(folded)} more are folded away. ` : "") +
        (record.left_out ? `${show(record.left_out)} with lower scores are not in this page.` : "");
    }

    const states = [null, true, false];
    const filters = wanted.map((want, number) => pair(
      picker(number ? "and" : "show where", widget.outcomes, want[0], (outcome) => {
        want[0] = outcome;
        search();
      }),
      picker("is", ["right or wrong", "right", "wrong"], 0, (state) => {
        want[1] = states[state];
        search();
      })));
    const containing = field("containing", "search", (value) => {
      text = value;
      search();
    });
    list.addEventListener("change", () => {
      chosen = found[list.selectedIndex];
      draw();
    });
    const scores = picker("ranked by", widget.scores, 0, (number) => {
      score = number;
      draw();
    });
    const whole = tick(`every ${widget.item}`, all, (ticked) => {
      all = ticked;
      draw();
    });
    const answers = tableOf(["", "", "answer"], ["answer"], outcomes);
    const headings = ["rank", widget.item, "score", "marks", "kind", "text"];
    const table = tableOf(headings, ["marks", "kind", "text"], items);
    const nodes = [picks(...filters, containing), told, list, title, facts, answers, picks(scores, whole), table, rest];
    return { nodes, start: search };
  }

  // --- The page ------------------------------------------------------------------------------------------------

  const KINDS = { map: drawMap, curves: drawCurves, table: drawTable, ranking: drawRanking };

  function start() {
    const place = document.getElementById("explore");
    const widgets = JSON.parse(document.getElementById("explore-data").textContent);
    place.replaceChildren(); // the words for readers without scripts
    for (const widget of widgets) {
      const about = widget.note ? `${widget.about} (${widget.note}.)` : widget.about;
      const section = el("section", { class: "widget" }, el("h3", {}, widget.title), soft(about));
      place.append(section);
      try {
        const made = KINDS[widget.kind](widget);
        section.append(...made.nodes);
        made.start();
      } catch (error) { // one widget that cannot be drawn must not take the others along
        section.append(el("p", { class: "note" }, `This part could not be drawn: ${error}`));
      }
    }
  }

  if (typeof document === "object") start();
})();
