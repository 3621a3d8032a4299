// src/ -> built/: one script, one style sheet, the page, and the licences of what the script contains.
import { copyFile, readFile, readdir, writeFile } from "node:fs/promises";
import { build } from "esbuild";

const result = await build({
  entryPoints: ["src/main.js", "src/page.css"],
  entryNames: "page",
  outdir: "built",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "none",
  metafile: true,
  define: { "process.env.NODE_ENV": '"production"' },
});
await copyFile("src/index.html", "built/index.html");

const inside = Object.values(result.metafile.outputs).flatMap((output) =>
  Object.entries(output.inputs).filter(([, { bytesInOutput }]) => bytesInOutput > 0).map(([file]) => file));
const folders = new Set(inside.map((file) => file.match(/^(.*node_modules\/(?:@[^/]+\/)?[^/]+)/)?.[1]).filter(Boolean));
const licences = await Promise.all([...folders].sort().map(async (folder) => {
  const { name, version, license } = JSON.parse(await readFile(`${folder}/package.json`, "utf8"));
  const file = (await readdir(folder)).find((entry) => /^licen[cs]e/i.test(entry));
  const text = file ? await readFile(`${folder}/${file}`, "utf8") : "(the package has no licence file)";
  return `${name} ${version} (${license})\n\n${text.trim()}\n`;
}));
await writeFile("built/licenses.txt", licences.join(`\n${"-".repeat(80)}\n\n`));
