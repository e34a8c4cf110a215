// Prints what Better Auth makes of fixed input, for kitrocket's tests of the same formats.
import { hashPassword } from "better-auth/crypto";
import { serializeSignedCookie } from "better-call";

const tokens = [
  "wYtCxyUJt9mFfCUXd3qcfcEPa3xadzrN",
  "00000000000000000000000000000000",
  "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz",
  "R8fkcHF9xIwhNtk1Jy3VNLrGHGhg3vSQ",
];
const secrets = ["a", "better-auth-secret-12345678901234567890", "ein schönes Geheimnis für beide Seiten 密"];
const passwords = ["correct horse", "pässwörd-ﬁ-Å-密码-🔑", "      8 spaces", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢!"];

const cookies = [];
for (const secret of secrets) {
  for (const token of tokens) {
    const line = await serializeSignedCookie("better-auth.session_token", token, secret, {
      maxAge: 604800, path: "/", httpOnly: true, sameSite: "lax",
    });
    cookies.push({ token, secret, line });
  }
}
cookies.push({
  token: "true",
  secret: secrets[1],
  line: await serializeSignedCookie("__Secure-better-auth.dont_remember", "true", secrets[1], {
    path: "/", httpOnly: true, sameSite: "lax", secure: true,
  }),
});
const hashes = [];
for (const password of passwords) hashes.push({ password, hash: await hashPassword(password) });
console.log(JSON.stringify({ cookies, hashes }, null, 2));
