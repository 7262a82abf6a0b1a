// What the interactive part of report.html computes: data in, data out. report_explore_view.js draws it.
"use strict";
const Explore = (() => {
  const UNSEEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

  /** A number as a person reads it: whole ones with thousands, others with four significant digits, "–" for none. */
  function show(value) {
    if (typeof value === "string") return clean(value);
    if (typeof value !== "number" || !Number.isFinite(value)) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
  }

  /** A text without control characters, and without the signs that turn the direction of what follows. */
  function clean(text) {
    return String(text).replace(UNSEEN, "\ufffd");
  }

  /** The view of a choice (a list of option numbers), or null. */
  function viewOf(views, choice) {
    return views.find((view) => view.choice.every((option, place) => option === choice[place])) || null;
  }

  /** The choice to compare with: `other` holds an option number for a select, or -1 for the same; null: nothing. */
  function compared(choice, other) {
    const found = choice.map((option, place) => (other[place] >= 0 ? other[place] : option));
    return found.every((option, place) => option === choice[place]) ? null : found;
  }

  /** Share of marks of `one` that `two` has too: mean over rows, and the lowest and the highest row; null if none. */
  function overlap(one, two) {
    const shares = one.map((row, r) => {
      const marks = [...row].filter((mark) => mark === "1").length;
      return marks ? [...row].filter((mark, c) => mark === "1" && two[r][c] === "1").length / marks : null;
    });
    const known = shares.filter((share) => share !== null);
    if (!known.length) return null;
    const sum = known.reduce((total, share) => total + share, 0);
    return { mean: sum / known.length, low: Math.min(...known), high: Math.max(...known) };
  }

  /** Rank from 1 of grid[row][column] in its row, or among all cells; equal ones share the better rank. */
  function rankOf(grid, row, column, scope) {
    const value = grid[row][column];
    const among = scope === "row" ? [grid[row]] : grid;
    return 1 + among.flat().filter((cell) => cell !== null && cell > value).length;
  }

  /** Smallest and largest number of nested lists; [0, 1] where there is none. */
  function extent(lists) {
    let low = Infinity, high = -Infinity;
    for (const list of lists) {
      for (const value of list) {
        if (value !== null && value < low) low = value;
        if (value !== null && value > high) high = value;
      }
    }
    return low <= high ? [low, high] : [0, 1];
  }

  /** Round places for an axis from low to high, at most `most` of them. */
  function ticks(low, high, most) {
    const rough = (high - low) / Math.max(most - 1, 1) || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, k) => Number(((first + k) * step).toPrecision(12)));
  }

  /** Row numbers that pass all tests. tests: one per column, null, {low, high} or {option}. */
  function passing(columns, tests) {
    const rows = [];
    const count = columns.length ? columns[0].values.length : 0;
    for (let row = 0; row < count; row++) {
      const fits = columns.every((column, place) => {
        const test = tests[place], value = column.values[row];
        if (!test) return true;
        if ("option" in test) return value === test.option;
        if (test.low === null && test.high === null) return true;
        return value !== null && (test.low === null || value >= test.low) && (test.high === null || value <= test.high);
      });
      if (fits) rows.push(row);
    }
    return rows;
  }

  /** Row numbers in the order of a column; absent values last, equal ones in their old order. */
  function sorted(rows, values, descending) {
    const sign = descending ? -1 : 1;
    return rows.slice().sort((a, b) => {
      const x = values[a], y = values[b];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return x === y ? a - b : x < y ? -sign : sign;
    });
  }

  /** Numbers of the records with a text in title or facts and the outcomes wanted: [[outcome, true, false or null]]. */
  function matching(records, text, wanted) {
    const needle = text.trim().toLowerCase();
    const out = [];
    records.forEach((record, number) => {
      const words = [record.title, ...record.facts.map((fact) => fact[1])].join("\n").toLowerCase();
      const fits = wanted.every(([outcome, good]) => good === null || record.outcomes[outcome][0] === good);
      if (fits && words.includes(needle)) out.push(number);
    });
    return out;
  }

  /** Places of a record's items by a score, best first, equal ones by their number. */
  function ranked(record, score) {
    return sorted(record.numbers.map((_, place) => place), record.scores[score], true);
  }

  /** What an item bears: "gold", or "kept, place 2 of 7" for marks whose order is told. */
  function badges(record, marks, number) {
    return marks.flatMap((mark, place) => {
      const at = record.marks[place].indexOf(number);
      if (at < 0) return [];
      return [mark.ordered ? `${mark.name}, place ${at + 1} of ${record.marks[place].length}` : mark.name];
    });
  }

  /** Places of the items to show: all, or the first `most` and those with a mark. `order` holds places. */
  function shortened(record, marks, order, most, all) {
    return order.filter((place, rank) => all || rank < most || badges(record, marks, record.numbers[place]).length);
  }

  /** Values divided by their largest, where that is above 0. */
  function scaled(values) {
    const most = extent([values])[1];
    return most > 0 ? values.map((value) => (value === null ? null : value / most)) : values;
  }

  /** The name of the band that a place lies in, or "". */
  function bandAt(bands, place) {
    const band = bands.find((b) => b.start <= place && place < b.end);
    return band ? band.name : "";
  }

  return {
    show, clean, viewOf, compared, overlap, rankOf, extent, ticks, passing, sorted, matching, ranked, badges, shortened,
    scaled, bandAt,
  };
})();
if (typeof module === "object") module.exports = Explore;
